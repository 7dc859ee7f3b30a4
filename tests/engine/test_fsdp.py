"""Sharded training is the same training: gradients, steps, checkpoints and figures are those of one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from prlhf.config import Config
from prlhf.engine import fsdp
from prlhf.engine.build import Job, build_job
from prlhf.engine.checkpoint import RunIdentity, load_checkpoint_, save_checkpoint
from prlhf.engine.fsdp import shard_, whole_weights
from prlhf.engine.trainer import batches_of_step, train
from prlhf.errors import ConfigError, Preempted
from prlhf.evaluation.report import load_final
from prlhf.generation import SamplingOptions, generate
from prlhf.models.packing import Packing
from prlhf.models.tensor_files import StoredTensors
from prlhf.sharding import is_sharded
from tests.engine.cuts import (
    FULL_STEP,
    RAGGED_STEP,
    SGD_RATE,
    assert_same,
    cut_config,
    gradients_of,
    gradients_of_step,
    step_of,
    whole,
)
from tests.engine.test_trainer import assert_alike
from tests.engine.two_ranks import nan_loss_, read, save, skipped_step
from tests.run_distributed import run_distributed_test
from tests.tiny_run import Tiny, at_step, checkpoints, perturbed_job, read_metrics, stop_signal

FULL: dict[str, Any] = {"model__lora": None}
SHARDED: dict[str, Any] = {"train__parallel": "fsdp"}
SMALL: dict[str, Any] = {"train__microbatch_tokens": 250}  # several passes a step
UNEVEN: dict[str, Any] = {"train__microbatch_tokens": 400}  # packed rows of pdpo: one pass on rank 0, two on rank 1
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("pdpo_individual", {**UNEVEN, "model__lora__rank": 3}),
    "lora_padded": ("pdpo_cluster", {**SMALL, "train__packing": False, "model__gradient_checkpointing": True}),
    "full": ("pdpo_individual_full", UNEVEN),
    "full_padded": ("pdpo_low_rank_full", {**SMALL, "train__packing": False}),
    "kto": ("kto", {**SMALL, "model__gradient_checkpointing": True}),
    "history": ("pdpo_history_full", SMALL),
    "reward": ("prm_low_rank_prior_full", SMALL),
    "sft": ("sft_full", SMALL),
}
QUICK_CASES = ("lora", "full")


def gradients_and_step(config: Config) -> dict[str, dict[str, Tensor]]:
    """Gradients of a full and a ragged step, and parameters after a clipped step of plain gradient descent."""
    job = perturbed_job(config)
    found = {}
    for step in (FULL_STEP, RAGGED_STEP):
        found[f"gradients {step}"] = gradients_of(job, *batches_of_step(job, step))
        job.model.zero_grad()
    parameters = job.model.trainable()
    result = step_of(job, FULL_STEP, torch.optim.SGD(parameters.values(), lr=SGD_RATE), max_grad_norm=0.05)
    assert result.grad_norm is not None and result.grad_norm > 0.05, "the clip must have something to do"
    return {**found, "parameters": {name: whole(parameter) for name, parameter in parameters.items()}}


def run_cases(tiny: Tiny, folder: Path, cases: Sequence[str]) -> None:
    """Gradients and steps on each of two ranks."""
    for name in cases:
        variant, settings = CASES[name]
        save(folder, name, gradients_and_step(cut_config(tiny, variant, **settings, **SHARDED)))


def run_sharded(tiny: Tiny, folder: Path) -> None:
    """On each of two ranks, what the default tests look at."""
    run_cases(tiny, folder, QUICK_CASES)
    save(folder, "nan_loss", skipped_step(tiny, nan_loss_, **FULL, **SHARDED))
    save(folder, "layout", layout_of(build_job(tiny.config(**SHARDED))))
    save(folder, "window", packs_beyond_a_window(tiny))
    save(folder, "passes", idle_passes(tiny))
    save(folder, "answered", gradients_after_an_answer(tiny))
    rewrite_checkpoint(resumable(tiny, **SHARDED), folder / "begun-lora", folder / "again-lora")


def run_sharded_further(tiny: Tiny, folder: Path) -> None:
    """On each of two ranks, what the slow tests look at."""
    run_cases(tiny, folder, [name for name in CASES if name not in QUICK_CASES])
    save(folder, "bf16", gradients_of_step(tiny.config(**FULL, **SHARDED, train__precision="bf16"), 0))
    bf16_base = tiny.config(**SHARDED, train__precision="bf16", model__dtype="bfloat16")
    save(folder, "bf16_base", gradients_of_step(bf16_base, 0))
    rewrite_checkpoint(resumable(tiny, **FULL, **SHARDED), folder / "begun-full", folder / "again-full")
    train(resumable(tiny, **FULL, **SHARDED), folder / "one_then_two")
    with pytest.raises(Preempted), at_step(2, stop_signal):
        train(resumable(tiny, **FULL, **SHARDED), folder / "two_then_one")
    first = tiny.config(method="dpo", train__max_steps=1, train__precision="bf16", **SHARDED)
    train(first, folder / "first")


def resumable(tiny: Tiny, **settings: Any) -> Config:
    """Evaluated on the way and at its end, where one rank answers prompts."""
    return tiny.config(name="resumable", train__max_steps=5, eval__every_steps=4, eval__generate=1, **settings)


def layout_of(job: Job) -> dict[str, bool]:
    """Whether each tensor is split."""
    return {name: is_sharded(parameter) for name, parameter in job.model.named_parameters()}


def packs_beyond_a_window(tiny: Tiny) -> list[bool]:
    """Whether rows are still packed when a sliding window is shorter, and as long, as the longest allowed row."""
    packed = []
    for window in (199, 200):
        job = build_job(tiny.config())
        assert job.model.packing is not None
        job.model.packing = Packing(window)
        shard_(job.model, precision="fp32", max_tokens=200)
        packed.append(job.model.packing is not None)
    return packed


def idle_passes(tiny: Tiny) -> list[list[bool]]:
    """Of the micro-batches of a full step and of one with a single row: whether each is idle."""
    job = build_job(cut_config(tiny, "pdpo_individual", **UNEVEN, **SHARDED))
    return [[batch.is_idle for batch in batches_of_step(job, step)[0]] for step in (FULL_STEP, RAGGED_STEP)]


def gradients_after_an_answer(tiny: Tiny) -> dict[str, Tensor]:
    """Of a full step, when the first thing that the model did was to answer."""
    job = perturbed_job(cut_config(tiny, "pdpo_individual", **UNEVEN, **SHARDED))
    with whole_weights(job.model):
        generate(job.model, ["Why?"], [1], options=SamplingOptions(max_new_tokens=2))
    return gradients_of(job, *batches_of_step(job, FULL_STEP))


def rewrite_checkpoint(config: Config, source: Path, target: Path) -> None:
    """Read the checkpoint of a run into sharded tensors, and write it again."""
    job = build_job(config)
    directory = source / "checkpoints" / checkpoints(source)[-1]
    progress = load_checkpoint_(directory, job.model, job.optimizer, spec=job.spec, data_sha256=job.data_sha256)
    moments = [slot for state in job.optimizer.state.values() for slot in state.values() if slot.dim() > 0]
    assert any(map(is_sharded, moments))
    identity = RunIdentity(job.spec, job.config.method, "", job.data_sha256)
    save_checkpoint(target, job.model, job.optimizer, replace(progress, step=9), identity, keep_last=1)


def begin(tiny: Tiny, run_dir: Path, **settings: Any) -> None:
    """A run that is stopped after two steps."""
    with pytest.raises(Preempted), at_step(2, stop_signal):
        train(resumable(tiny, **settings), run_dir)


@pytest.fixture(scope="module")
def sharded(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `run_sharded` filled; the run that one rank began is read there."""
    folder = tmp_path_factory.mktemp("sharded")
    begin(tiny, folder / "begun-lora")
    run_distributed_test(run_sharded, 2, tiny, folder)
    return folder


@pytest.fixture(scope="module")
def sharded_further(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `run_sharded_further` filled; runs that one rank began are read and gone on with there."""
    folder = tmp_path_factory.mktemp("sharded_further")
    for name in ("begun-full", "one_then_two"):
        begin(tiny, folder / name, **FULL)
    run_distributed_test(run_sharded_further, 2, tiny, folder)
    return folder


FOLDERS = {True: "sharded", False: "sharded_further"}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("case", [case if case in QUICK_CASES else pytest.param(case, marks=SLOW) for case in CASES])
def test_shards_have_gradient_and_step_of_one_process(
    tiny: Tiny, request: pytest.FixtureRequest, case: str
) -> None:
    """Though one rank makes more passes than the other has rows for, or has no row at all."""
    variant, settings = CASES[case]
    folder = request.getfixturevalue(FOLDERS[case in QUICK_CASES])
    expected = gradients_and_step(cut_config(tiny, variant, **settings))
    for actual in read(folder, case):
        for part, tensors in expected.items():
            assert_same(actual[part], tensors)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "settings"), [("bf16", FULL), ("bf16_base", {"model__dtype": "bfloat16"})])
def test_bf16_shards_have_nearly_the_float32_gradient(
    tiny: Tiny, sharded_further: Path, case: str, settings: dict[str, Any]
) -> None:
    exact = gradients_of_step(tiny.config(**settings), 0)
    for rough in read(sharded_further, case):
        assert {gradient.dtype for gradient in rough.values()} == {torch.float32}, "summed in float32"
        flat, flat_exact = (torch.cat([of[name].flatten() for name in exact]) for of in (rough, exact))
        assert not torch.equal(flat, flat_exact)
        assert F.cosine_similarity(flat, flat_exact, dim=0) > 0.98
        assert float(flat.norm()) == pytest.approx(float(flat_exact.norm()), rel=0.05)


def test_a_model_may_answer_before_it_is_trained(tiny: Tiny, sharded: Path) -> None:
    job = perturbed_job(cut_config(tiny, "pdpo_individual", **UNEVEN))
    expected = gradients_of(job, *batches_of_step(job, FULL_STEP))
    for actual in read(sharded, "answered"):
        assert_same(actual, expected)


def test_backbone_is_split_and_users_are_whole(sharded: Path) -> None:
    for layout in read(sharded, "layout"):
        assert {split for name, split in layout.items() if name.startswith("backbone.")} == {True}
        assert {split for name, split in layout.items() if name.startswith("user_encoder.")} == {False}


def test_ranks_make_as_many_passes(sharded: Path) -> None:
    assert read(sharded, "passes") == [[[False, True], [True]], [[False, False], [False]]]


def test_rows_are_padded_where_some_exceed_a_window(sharded: Path) -> None:
    assert read(sharded, "window") == [[False, True], [False, True]]


def test_a_loss_that_is_not_finite_on_one_rank_changes_no_shard(sharded: Path) -> None:
    for seen in read(sharded, "nan_loss"):
        assert seen["skipped"] and seen["gradients_left"] == []
        assert all(torch.equal(seen["before"][name], seen["after"][name]) for name in seen["before"])
        assert any(name.startswith("backbone.") and name.endswith(".exp_avg") for name in seen["before"])


@pytest.mark.slow
def test_runs_go_on_with_shards_and_without(tiny: Tiny, sharded_further: Path, tmp_path: Path) -> None:
    """One rank's run is finished by two with shards, and theirs by one; figures are the same."""
    expected = train(resumable(tiny, **FULL), tmp_path / "run")
    train(resumable(tiny, **FULL), sharded_further / "two_then_one")
    for run_dir in (sharded_further / "one_then_two", sharded_further / "two_then_one"):
        assert_alike(run_dir, tmp_path / "run")
        assert load_final(run_dir)["accuracy"] == expected["accuracy"]
        assert (run_dir / "eval" / "step-00000004.json").is_file()
        assert len((run_dir / "samples" / "policy.jsonl").read_text().splitlines()) == 2, "ann's answer and bob's"


@pytest.mark.parametrize("name", ["lora", pytest.param("full", marks=SLOW)])
def test_a_checkpoint_read_into_shards_is_written_bit_for_bit(request: pytest.FixtureRequest, name: str) -> None:
    sharded = request.getfixturevalue(FOLDERS[name == "lora"])
    before = sharded / f"begun-{name}" / "checkpoints" / checkpoints(sharded / f"begun-{name}")[-1]
    for file in ("trainable", "users", "optimizer"):
        expected = load_file(before / f"{file}.safetensors")
        path = sharded / f"again-{name}" / "checkpoints" / "step-00000009" / f"{file}.safetensors"
        actual = StoredTensors(path)
        assert bool(list(path.parent.glob(f"{file}.rank*"))) == (file != "users")
        assert actual.kinds.keys() == expected.keys()
        assert all(torch.equal(actual.read(key), tensor) for key, tensor in expected.items())


@pytest.mark.slow
def test_first_loss_of_dpo_is_ln_2_in_bf16_shards(sharded_further: Path) -> None:
    """The reference is scored over gathered weights, the policy over weights that come and go: the same function."""
    (line,) = read_metrics(sharded_further / "first")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert line["grad_norm"] > 0


def test_one_rank_has_nothing_to_shard(tiny: Tiny) -> None:
    assert not any(layout_of(build_job(tiny.config(**SHARDED))).values())


def test_a_device_that_shards_nothing_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    job = build_job(tiny.config())
    monkeypatch.setattr(fsdp, "world_size", lambda: 2)
    monkeypatch.setattr(type(job.model), "device", torch.device("mps"))
    with pytest.raises(ConfigError, match="train.parallel: got fsdp on mps, expected cuda or cpu; use ddp"):
        shard_(job.model, precision="fp32", max_tokens=10)
