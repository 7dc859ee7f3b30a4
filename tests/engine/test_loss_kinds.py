"""SimPO, ORPO and KTO by name: they learn opposed tastes, keep no reference they do not need, survive a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prlhf.data.collate import collate_pairs
from prlhf.data.tokenize import tokenize_pairs
from prlhf.engine.build import build_job, restore_reference_, tokenize_limits
from prlhf.engine.check_data import check_data
from prlhf.engine.checkpoint import Progress
from prlhf.engine.evaluate import evaluate_checkpoint
from prlhf.engine.trainer import save_job, train
from prlhf.errors import DataError
from prlhf.models import load_policy
from tests.tiny_run import THINGS, Tiny, opposed_records, perturb_, read_metrics, write_jsonl

LEARN: dict[str, Any] = {
    "train__max_steps": 30, "train__batch_rows": 8, "train__user_lr": 5e-2, "checkpoint__every_steps": 0
}
FURTHER_USER_MODELS = ("uniform", "cluster", "low_rank")
KINDS = {"simpo": {"loss__beta": 2.0, "loss__gamma": 0.5}, "orpo": {"loss__beta": 2.0}, "kto": {}}


def settings_of(kind: str) -> dict[str, Any]:
    return {"loss__kind": kind, **KINDS[kind]}


def unpaired_file(path: Path) -> Path:
    """Each judgement of a pair as two rows of its own."""
    rows = []
    for record in opposed_records(THINGS):
        shared = {"user_id": record["user_id"], "prompt": record["prompt"]}
        rows += [{**shared, "response": record[key], "label": key == "chosen"} for key in ("chosen", "rejected")]
    return write_jsonl(path, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_opposed_users_are_both_served(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    final = train(tiny.config(**settings_of(kind), **LEARN), tmp_path / "run")
    assert final["per_user"]["ann"]["accuracy"] == final["per_user"]["bob"]["accuracy"] == 1.0
    assert final["margin"] == ("log_ratio" if kind == "kto" else "mean_logp")
    vanilla = train(tiny.config(method="dpo", **settings_of(kind), train__max_steps=2), tmp_path / "vanilla")
    assert sum(vanilla["per_user"][user]["accuracy"] for user in ("ann", "bob")) == 1.0


@pytest.mark.parametrize("method", ["dpo", "pdpo"])
def test_the_first_loss_of_kto_is_half(tiny: Tiny, tmp_path: Path, method: str) -> None:
    """sigmoid(0) = 1/2 for every row where policy and reference are one; a soft prompt moves the policy by a little."""
    train(tiny.config(method=method, loss__kind="kto", train__max_steps=1), tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(0.5, abs=1e-6 if method == "dpo" else 0.1)
    assert line["labels/liked"] + line["labels/disliked"] == 1.0
    assert line["kl"] == pytest.approx(0.0, abs=1e-4 if method == "dpo" else 5.0)


def test_unpaired_rows_train_and_their_pairs_are_evaluated(tiny: Tiny, tmp_path: Path) -> None:
    source = str(unpaired_file(tmp_path / "thumbs.jsonl"))
    config = tiny.config(loss__kind="kto", data__source=source, data__eval_prompts=0.3, train__max_steps=2)
    final = train(config, tmp_path / "run")
    assert final["data"]["train_rows"] == 20 and final["accuracy"]["seen"]["num_rows"] == 6
    again = evaluate_checkpoint(tmp_path / "run", source=None, overrides=[])
    assert again["accuracy"] == final["accuracy"]
    assert "(unpaired rows)" in check_data(source)
    with pytest.raises(DataError, match="loss.kind kto"):
        build_job(tiny.config(data__source=source))


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_full_fine_tuning_without_reference_keeps_no_copy_and_finds_it_again(tiny: Tiny, kind: str) -> None:
    job = build_job(tiny.config(**settings_of(kind), model__lora=None))
    assert job.reference is None and not job.model.reference.frozen_copy
    rows = job.preferences.eval_seen
    batch = collate_pairs(
        tokenize_pairs(rows, job.model.tokenizer, None, **tokenize_limits(job.config, job.model)).rows, job.pad_id
    )
    start = job.model.reference.sequence_logps(batch)[0]
    perturb_(job)
    assert not torch.equal(job.model.reference.sequence_logps(batch)[0], start), "it is the policy itself for now"
    restore_reference_(job)
    assert torch.equal(job.model.reference.sequence_logps(batch)[0], start)


@pytest.mark.parametrize(
    "user", ["none", "individual", *(pytest.param(kind, marks=pytest.mark.slow) for kind in FURTHER_USER_MODELS)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_back_the_policy(tiny: Tiny, tmp_path: Path, kind: str, user: str) -> None:
    method = "dpo" if user == "none" else "pdpo"
    config = tiny.config(method=method, user__kind=user, **settings_of(kind), train__max_steps=1)
    job = perturb_(build_job(config))
    save_job(job, Progress(step=1), tmp_path / "run")
    loaded = load_policy(tmp_path / "run")
    users = None if user == "none" else job.model.users
    limits = tokenize_limits(config, job.model)
    batch = collate_pairs(
        tokenize_pairs(job.preferences.eval_seen, loaded.tokenizer, users, **limits).rows, job.pad_id
    )
    user_ids = None if user == "none" else batch.user_ids
    job.model.eval()
    with torch.no_grad():
        expected, actual = (model.logps(batch, user_ids) for model in (job.model, loaded))
    assert torch.equal(actual.chosen, expected.chosen) and np.isfinite(expected.chosen.numpy()).all()
