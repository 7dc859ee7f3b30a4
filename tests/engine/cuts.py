"""One global batch, cut in different ways: what its gradient is, and where a step takes the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prlhf.config import Config
from prlhf.data.collate import collate_labelled, collate_pairs
from prlhf.data.tokenize import TokenizedLabelled
from prlhf.engine.build import Job
from prlhf.engine.optim import all_reduce_gradients_
from prlhf.engine.reference import LiveReference, no_reference
from prlhf.engine.step import Batch, StepResult, accumulate_gradients_, train_step_
from prlhf.engine.trainer import batches_of_step
from tests.tiny_run import Tiny, perturbed_job

BATCH_ROWS = 8  # the 17 rows make batches of 8, 8 and 1
FULL_STEP, RAGGED_STEP = 0, 2
SGD_RATE = 0.1

_METHODS: dict[str, dict[str, Any]] = {
    "pdpo_individual": {"method": "pdpo", "user__kind": "individual", "loss__sft_weight": 0.5},
    "pdpo_cluster": {"method": "pdpo", "user__kind": "cluster"},
    "pdpo_low_rank": {"method": "pdpo", "user__kind": "low_rank", "user__rank": 2},
    "dpo": {"method": "dpo"},
    "simpo": {"method": "pdpo", "loss__kind": "simpo", "loss__beta": 2.0, "loss__gamma": 0.5},
    "orpo": {"method": "pdpo", "loss__kind": "orpo", "loss__beta": 0.5},
    "kto": {"method": "pdpo", "loss__kind": "kto", "loss__desirable_weight": 1.5},
    "sft": {"method": "sft"},
    "rm": {"method": "rm"},
    "prm_individual": {"method": "prm", "user__kind": "individual"},
    "pdpo_history": {"method": "pdpo", "user__kind": "history"},
    "prm_low_rank_prior": {"method": "prm", "user__kind": "low_rank", "user__rank": 2, "user__prior": 0.5},
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{name}{suffix}": {**settings, **model}
    for name, settings in _METHODS.items()
    for suffix, model in (("", {}), ("_full", {"model__lora": None}))
}


def cut_config(tiny: Tiny, variant: str, **settings: Any) -> Config:
    return tiny.config(**VARIANTS[variant], train__batch_rows=BATCH_ROWS, **settings)


def reference_of(job: Job) -> Callable[[Batch], Any]:
    return no_reference if job.reference is None else LiveReference(job.reference)


def gradients_of(job: Job, batches: Sequence[Batch], num_global_rows: int) -> dict[str, Tensor]:
    """Gradients of the global batch whose micro-batches on this rank are `batches`."""
    accumulate_gradients_(
        job.model, job.objective, batches, reference_of=reference_of(job), num_global_rows=num_global_rows,
        autocast=job.autocast,
    )
    parameters = job.model.trainable()
    all_reduce_gradients_(parameters.values())
    return {name: whole(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    """A copy, put together from all ranks' parts where it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients_of_step(config: Config, step: int) -> dict[str, Tensor]:
    job = perturbed_job(config)
    return gradients_of(job, *batches_of_step(job, step))


def gradients_of_users_apart(config: Config, rank: int, world_size: int) -> dict[str, Tensor]:
    """Of four rows of ann and four of bob, cut by user: at world size 2 each rank knows one of them only."""
    job = perturbed_job(config)
    by_user = [[row for row in job.rows if row.user_id == user][:4] for user in (1, 2)]
    return gradients_of(job, [collate_pairs(rows, job.pad_id) for rows in by_user[rank::world_size]], 8)


def gradients_of_one_row(config: Config, rank: int) -> dict[str, Tensor]:
    """Of a global batch with a single unpaired row, which rank 0 has."""
    job = perturbed_job(config)
    rows = [row for row in job.rows if isinstance(row, TokenizedLabelled)][:1]
    return gradients_of(job, [] if rank else [collate_labelled(rows, job.pad_id)], 1)


def step_of(job: Job, step: int, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> StepResult:
    batches, num_rows = batches_of_step(job, step)
    return train_step_(
        job.model, optimizer, job.objective, batches, reference_of=reference_of(job), num_global_rows=num_rows,
        max_grad_norm=max_grad_norm, autocast=job.autocast,
    )


def parameters_after_sgd(config: Config) -> dict[str, Tensor]:
    """Parameters after one clipped step of plain gradient descent."""
    job = perturbed_job(config)
    parameters = job.model.trainable()
    result = step_of(job, FULL_STEP, torch.optim.SGD(parameters.values(), lr=SGD_RATE), max_grad_norm=0.05)
    assert result.grad_norm is not None and result.grad_norm > 0.05, "the clip must have something to do"
    return {name: whole(parameter) for name, parameter in parameters.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the order of float32 sums: to 1e-6, or 1e-6 of the largest value where that is above 1 (sft)."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = actual[name] - tensor
        assert difference.abs().max() < 1e-6 * max(1.0, tensor.abs().max().item()), name
        assert difference.norm() <= 1e-5 * tensor.norm(), name
