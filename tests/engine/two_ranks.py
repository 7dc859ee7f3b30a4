"""What two ranks do, all in one group of processes (they take seconds to start); the tests read what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prlhf.distributed import barrier, rank
from prlhf.engine import optim, trainer
from prlhf.engine.build import Job, build_job
from prlhf.engine.objective import ReferenceLogps, RowLosses
from prlhf.engine.step import Batch
from prlhf.engine.trainer import batches_of_step, train
from prlhf.errors import ConfigError, Preempted, PrlhfError
from prlhf.usermodel import HistoryUserModel
from tests.engine.cuts import (
    FULL_STEP,
    RAGGED_STEP,
    VARIANTS,
    cut_config,
    gradients_of_one_row,
    gradients_of_step,
    gradients_of_users_apart,
    parameters_after_sgd,
    step_of,
    whole,
)
from tests.tiny_run import Tiny, at_step, perturb_, stop_signal


def save(folder: Path, name: str, value: Any) -> None:
    torch.save(value, folder / f"{name}-{rank()}.pt")


def read(folder: Path, name: str) -> list[Any]:
    """What both ranks saved under a name."""
    return [torch.load(folder / f"{name}-{number}.pt", weights_only=True) for number in range(2)]


def run_everything(tiny: Tiny, folder: Path) -> None:
    """On each of two ranks, gradients in several buckets."""
    optim.BUCKET_ELEMENTS = 500
    for variant in VARIANTS:
        config = cut_config(tiny, variant)
        save(folder, f"{variant}-{FULL_STEP}", gradients_of_step(config, FULL_STEP))
        save(folder, f"{variant}-{RAGGED_STEP}", gradients_of_step(config, RAGGED_STEP))
        save(folder, f"{variant}-sgd", parameters_after_sgd(config))
    users_apart = cut_config(tiny, "pdpo_individual")
    save(folder, "users_apart", gradients_of_users_apart(users_apart, rank(), 2))
    save(folder, "one_row", gradients_of_one_row(cut_config(tiny, "kto"), rank()))
    save(folder, "nan_loss", skipped_step(tiny, nan_loss_))
    save(folder, "inf_gradient", skipped_step(tiny, inf_gradient_))
    save(folder, "refused", refused_batch_rows(tiny))
    save(folder, "start", start_of_ranks_that_round_apart(tiny))
    train(tiny.config(method="dpo", train__max_steps=1), folder / "dpo_first")
    save(folder, "rows", epoch_of_still_policy(tiny, folder / "still"))
    save(folder, "stopped", stopped_run(tiny, folder / "two_then_one"))
    train(resumable(tiny), folder / "one_then_two")
    save(folder, "always_nan", run_of_nans(tiny, folder / "always_nan"))
    save(folder, "no_folder", run_without_a_place_for_checkpoints(tiny, folder / "no_folder"))


def resumable(tiny: Tiny) -> Any:
    return tiny.config(name="resumable", train__max_steps=6)


def still(tiny: Tiny) -> Any:
    """One epoch and its ragged end, at rate 0: figures that depend on the rows alone."""
    return tiny.config(name="still", train__lr=0.0, train__user_lr=0.0, train__max_steps=5)


def refused_batch_rows(tiny: Tiny) -> list[str]:
    try:
        build_job(tiny.config(train__batch_rows=7))
    except ConfigError as error:
        return error.messages
    return []


def start_of_ranks_that_round_apart(tiny: Tiny) -> dict[str, Tensor]:
    """An encoder's tensors at step 0, where rank 1 computes features a little differently."""
    exact = HistoryUserModel.features

    def features(self: HistoryUserModel, *args: Any) -> Tensor:
        return exact(self, *args) * (1 + 1e-4 * rank())

    with mock.patch.object(HistoryUserModel, "features", features):
        job = build_job(cut_config(tiny, "pdpo_history"))
    assert job.model.user_encoder is not None
    return {name: whole(parameter) for name, parameter in job.model.user_encoder.named_parameters()}


def epoch_of_still_policy(tiny: Tiny, run_dir: Path) -> list[list[int]]:
    """Rows that this rank sees in each step of an epoch, ragged end included."""
    train(still(tiny), run_dir)
    job = build_job(still(tiny))
    return [
        [row for batch in batches_of_step(job, step)[0] for row in batch.rows.tolist()] for step in range(5)
    ]


def stopped_run(tiny: Tiny, run_dir: Path) -> str:
    """The signal reaches rank 1 alone."""
    action = stop_signal if rank() == 1 else lambda: None
    try:
        with at_step(2, action):
            train(resumable(tiny), run_dir)
    except Preempted as error:
        return str(error)
    return "not stopped"


def nan_loss_(job: Job) -> None:
    """The reference of one rank's rows is lost: loss and gradient are not numbers there."""
    sound = job.objective

    class Broken:
        terms = sound.terms
        is_unpaired = False

        def passes(self) -> list[Broken]:
            return [self]

        def __call__(self, policy: Any, batch: Any, reference: ReferenceLogps, kl: None) -> RowLosses:
            return sound(policy, batch, ReferenceLogps(reference.chosen * float("nan"), reference.rejected))

    job.objective = Broken()  # type: ignore[assignment]


def inf_gradient_(job: Job) -> None:
    """The loss is finite and the gradient is not."""
    parameter = next(iter(job.model.trainable().values()))
    parameter.register_hook(lambda gradient: gradient + float("inf"))


def skipped_step(tiny: Tiny, break_: Callable[[Job], None], **settings: Any) -> dict[str, Any]:
    """A sound step, then one that is broken on rank 1 alone: state before and after it."""
    job = perturb_(build_job(tiny.config(**settings)))
    step_of(job, 0, job.optimizer, max_grad_norm=1.0)
    before = state_of(job)
    if rank() == 1:
        break_(job)
    result = step_of(job, 1, job.optimizer, max_grad_norm=1.0)
    left = [name for name, parameter in job.model.trainable().items() if parameter.grad is not None]
    return {"before": before, "after": state_of(job), "skipped": result.skipped, "gradients_left": left}


def state_of(job: Job) -> dict[str, Tensor]:
    state = {}
    for name, parameter in job.model.trainable().items():
        state[name] = whole(parameter)
        for slot, value in job.optimizer.state[parameter].items():
            state[f"{name}.{slot}"] = whole(value)
    return state


def run_of_nans(tiny: Tiny, run_dir: Path) -> list[str]:
    """Rank 1 has a broken reference from the start."""
    make_reference = trainer._make_reference

    def broken(job: Job, *args: Any) -> Callable[[Batch], Any]:
        reference = make_reference(job, *args)
        return (lambda batch: ReferenceLogps(*(x * float("nan") for x in reference(batch)))) if rank() else reference

    try:
        with mock.patch.object(trainer, "_make_reference", broken):
            train(tiny.config(train__max_skipped_steps=2), run_dir)
    except PrlhfError as error:
        return error.messages
    return []


def run_without_a_place_for_checkpoints(tiny: Tiny, run_dir: Path) -> list[str]:
    """A file is where the main rank has to make their folder."""
    if rank() == 0:
        run_dir.mkdir()
        (run_dir / "checkpoints").touch()
    barrier()
    try:
        train(tiny.config(train__max_steps=1), run_dir)
    except PrlhfError as error:
        return error.messages
    return []
