"""What a configuration asks for and cannot be had is refused before any work, in one line that names the key."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prlhf.engine.build import build_job, hash_rows, make_autocast, make_spec, pick_device
from prlhf.errors import ConfigError, DataError, ModelError
from tests.engine.two_ranks import read
from tests.policies import give_longrope_
from tests.tiny_run import MAX_POSITIONS, NUM_TRAIN_ROWS, Tiny, write_jsonl


def test_the_configuration_reaches_the_job(tiny: Tiny) -> None:
    job = build_job(tiny.config(loss__alpha=0.3, loss__beta=0.2, loss__sft_weight=0.7, train__max_steps=9))
    assert (job.objective.alpha, job.objective.beta, job.objective.sft_weight) == (0.3, 0.2, 0.7)
    assert job.max_steps == 9
    assert len(job.rows) == NUM_TRAIN_ROWS
    assert job.model.users is not None and job.model.users.user_ids == ("ann", "bob")
    assert job.model.soft_prompt.num_user_tokens == 3
    assert job.model.training


@pytest.mark.parametrize(("epochs", "batch_rows", "steps"), [(1, 4, 5), (2, 4, 10), (3, 17, 3), (1, 8, 3)])
def test_steps_are_whole_epochs_ragged_ends_included(tiny: Tiny, epochs: int, batch_rows: int, steps: int) -> None:
    config = tiny.config(train__epochs=epochs, train__batch_rows=batch_rows, train__max_steps=None)
    assert build_job(config).max_steps == steps


@pytest.mark.parametrize("grouped", [True, False])
def test_judgments_of_one_pair_share_steps_where_that_is_asked_for(tiny: Tiny, grouped: bool) -> None:
    job = build_job(tiny.config(train__group_pairs=grouped))
    rows = [job.rows[i] for step in range(job.sampler.steps_per_epoch) for i in job.sampler.rows_of_step(step)]
    pairs = [frozenset(row.responses) for row in rows]
    changes = sum(before != after for before, after in zip(pairs, pairs[1:], strict=False))
    assert (changes == len(set(pairs)) - 1) == grouped


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_methods_without_users_have_no_soft_prompt(tiny: Tiny, method: str) -> None:
    job = build_job(tiny.config(method=method))
    assert job.model.user_encoder is None
    assert {row.user_id for row in job.rows} == {0}


def test_lora_trains_adapters_and_users_only(tiny: Tiny) -> None:
    trained = build_job(tiny.config()).model.trainable()
    assert all("lora_" in name or name.startswith("user_encoder.") for name in trained)
    assert {name for name in trained if "lora_" not in name} == {"user_encoder.generic", "user_encoder.offsets"}


def test_full_fine_tuning_keeps_a_frozen_reference_only_where_one_is_used(tiny: Tiny) -> None:
    assert build_job(tiny.config(model__lora=None)).model.reference.frozen_copy
    assert not build_job(tiny.config(model__lora=None, method="sft")).model.reference.frozen_copy
    assert not build_job(tiny.config()).model.reference.frozen_copy


def test_equal_seeds_give_equal_jobs(tiny: Tiny) -> None:
    first, second, other = (build_job(tiny.config(seed=seed)).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["user_encoder.generic"], other["user_encoder.generic"])


def test_ranks_that_compute_an_encoders_start_a_little_differently_start_alike(two_ranks: Path) -> None:
    first, second = read(two_ranks, "start")
    assert first.keys() == second.keys() and "encoder.layer" in first
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_batch_rows_that_two_ranks_cannot_share_are_refused(two_ranks: Path) -> None:
    for messages in read(two_ranks, "refused"):
        assert messages == ["train.batch_rows: got 7, which 2 ranks do not divide; use a multiple of 2"]


def test_sequences_beyond_the_positions_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=f"data.max_tokens: got {MAX_POSITIONS + 1}.*{MAX_POSITIONS} positions"):
        build_job(tiny.config(data__max_tokens=MAX_POSITIONS + 1))


def test_sequences_that_change_the_frequencies_of_those_beside_them_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = give_longrope_(Path(shutil.copytree(tiny.model, tmp_path / "model")), 150)
    build_job(tiny.config(model__backbone=folder, data__max_tokens=150))
    expected = "data.max_tokens: got 151, but the backbone has 150 positions up to its original_max_position_embeddings"
    with pytest.raises(ConfigError, match=f"{expected}.*use at most 150"):
        build_job(tiny.config(model__backbone=folder, data__max_tokens=151))


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="train.device: got cuda"):
        pick_device("cuda")


def test_auto_takes_the_cpu_when_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")


def test_fp32_has_no_autocast() -> None:
    assert make_autocast("fp32", torch.device("cpu")) is contextlib.nullcontext
    with make_autocast("bf16", torch.device("cpu"))():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data__source": "/nowhere/at/all"}, DataError, "data.source '/nowhere/at/all'"),
        ({"model__backbone": "/nowhere/at/all"}, ModelError, "model.backbone '/nowhere/at/all'"),
        ({"model__backbone": "builtin:huge"}, ModelError, "builtin:tiny"),
        ({"model__lora__targets": ["q_prj"]}, ModelError, "lora.targets: 'q_prj'"),
    ],
)
def test_what_is_missing_is_named(tiny: Tiny, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_job(tiny.config(**settings))


def test_data_of_which_no_row_fits_is_refused_with_the_reasons(tiny: Tiny, tmp_path: Path) -> None:
    same = {"user_id": "ann", "prompt": "Why?", "chosen": "a" * 900, "rejected": "a" * 901}
    path = write_jsonl(tmp_path / "train.jsonl", [same]).parent
    with pytest.raises(DataError, match="no training row is left after tokenizing.*max_tokens"):
        build_job(tiny.config(data__source=str(path), data__max_tokens=40, data__max_prompt_tokens=20))


def test_the_hash_of_the_rows_sees_every_token_and_user(tiny: Tiny, tmp_path: Path) -> None:
    rows = list(build_job(tiny.config()).rows)
    assert hash_rows(rows) == hash_rows(list(rows))
    assert len({hash_rows(rows), hash_rows(rows[:-1]), hash_rows(rows[::-1])}) == 3


def test_the_spec_carries_every_setting_of_the_policy(tiny: Tiny) -> None:
    spec = make_spec(
        tiny.config(seed=5, model__lora__dropout=0.1, model__lora__targets=["q_proj"], user__init="uniform")
    )
    assert (spec.seed, spec.lora_rank, spec.lora_alpha, spec.lora_dropout) == (5, 2, 4.0, 0.1)
    assert (spec.lora_targets, spec.user_init, spec.num_user_tokens) == (("q_proj",), "uniform", 3)
    assert make_spec(tiny.config(model__lora=None)).lora_rank is None


@pytest.mark.parametrize(
    ("changes", "capability", "said"),
    [
        ({"train__precision": "bf16"}, "AVX2", ["instructions"]),
        ({"train__precision": "bf16"}, "AVX512", []),
        ({"model__dtype": "bfloat16"}, "AVX2", ["instructions"]),
        ({"model__dtype": "bfloat16", "model__lora": None}, "AVX512", ["round away"]),
        ({}, "AVX2", []),
    ],
)
def test_bfloat16_that_costs_steps_or_time_is_said(tiny, monkeypatch, caplog, changes, capability, said):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    build_job(tiny.config(**changes))
    warnings = [record.getMessage() for record in caplog.records if "bfloat16" in record.getMessage()]
    assert len(warnings) == len(said)
    assert all(word in warning for word, warning in zip(said, warnings, strict=True))
