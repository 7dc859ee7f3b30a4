"""Every loss kind with every user model and method takes a step, and its checkpoint gives the same model back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from prlhf.config_checks import PERSONAL_METHODS, REFERENCE_FREE_KINDS, USER_KINDS
from prlhf.data.collate import PairBatch
from prlhf.engine.build import Job, build_job
from prlhf.engine.checkpoint import Progress
from prlhf.engine.objective import Method
from prlhf.engine.trainer import batches_of_step, save_job
from prlhf.losses import PairwiseKind
from prlhf.models import load_model
from tests.engine.cuts import step_of
from tests.tiny_run import Tiny, perturb_
from tests.user_world import write_user_world

LORA = {"rank": 2, "alpha": 4}


def combinations() -> Iterator[Any]:
    """(method, user model, LoRA); LoRA for all, full fine-tuning for the encoders, which read what it trains."""
    for method in get_args(Method):
        for user_kind in USER_KINDS if method in PERSONAL_METHODS else ("none",):
            yield pytest.param(method, user_kind, LORA, id=f"{method}-{user_kind}")
            if user_kind in ("text", "history"):
                yield pytest.param(method, user_kind, None, id=f"{method}-{user_kind}-full")


@pytest.fixture(scope="module")
def world(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny.model, write_user_world(tmp_path_factory.mktemp("world") / "data"))


def values_of(model: Any, job: Job) -> torch.Tensor:
    """What a model says of the responses of a batch, as each row's user."""
    batch = batches_of_step(job, 0)[0][0]
    users = batch.user_ids if model.user_encoder is not None else None
    with model.evaluating():
        return model.sequence_values(batch, users, batch.context)[0]


@pytest.mark.parametrize(("method", "user_kind", "lora"), list(combinations()))
def test_a_step_of_every_loss_kind_is_taken_and_survives_a_checkpoint(
    world: Tiny, tmp_path: Path, method: Any, user_kind: str, lora: dict[str, int] | None
) -> None:
    config = world.config(
        method=method, user__kind=user_kind, model__lora=lora, train__batch_rows=2, checkpoint__keep_last=9
    )
    job = perturb_(build_job(config))
    sound = job.objective
    kinds: Any = (*get_args(PairwiseKind), *REFERENCE_FREE_KINDS) if method in ("dpo", "pdpo") else (sound.kind,)
    for step, kind in enumerate(kinds):
        job.objective = dataclasses.replace(sound, kind=kind)
        before = values_of(job.model, job)
        result = step_of(job, step, job.optimizer, max_grad_norm=1.0)
        assert not result.skipped and math.isfinite(float(result.sums["loss"])), kind
        after = values_of(job.model, job)
        assert not torch.equal(before, after), kind
        save_job(job, Progress(step=step + 1), tmp_path)
        loaded = load_model(tmp_path)
        assert type(loaded) is type(job.model)
        assert torch.equal(values_of(loaded, job), after), kind


@pytest.mark.parametrize(("method", "user_kind"), [("dpo", "none"), *(("pdpo", kind) for kind in USER_KINDS)])
def test_a_step_on_unpaired_rows_is_taken_and_survives_a_checkpoint(
    world: Tiny, tmp_path: Path, method: Any, user_kind: str
) -> None:
    settings = {"method": method, "user__kind": user_kind, "loss__kind": "kto", "train__batch_rows": 2}
    job = perturb_(build_job(world.config(**settings)))
    before = values_of(job.model, job)
    result = step_of(job, 0, job.optimizer, max_grad_norm=1.0)
    assert not result.skipped and math.isfinite(float(result.sums["loss"]))
    after = values_of(job.model, job)
    assert not torch.equal(before, after)
    save_job(job, Progress(step=1), tmp_path)
    assert torch.equal(values_of(load_model(tmp_path), job), after)


def test_the_world_has_pairs_for_every_method(world: Tiny) -> None:
    """Else the test above would be about fewer methods than it says."""
    batch = batches_of_step(build_job(world.config(user__kind="history")), 0)[0][0]
    assert isinstance(batch, PairBatch) and batch.context is not None
