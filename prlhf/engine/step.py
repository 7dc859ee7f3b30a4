"""One optimizer step of the global batch, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from prlhf.data.collate import LabelledBatch, PairBatch, ResponseBatch
from prlhf.distributed import all_reduce_any, all_reduce_sum
from prlhf.engine.faults import reach
from prlhf.engine.kl import estimate_kl
from prlhf.engine.objective import Objective, ReferenceLogps
from prlhf.engine.optim import all_reduce_gradients_, clip_gradients_
from prlhf.models.policy import PersonalizedPolicy
from prlhf.models.reward import PersonalizedRewardModel

Batch = PairBatch | ResponseBatch | LabelledBatch
Model = PersonalizedPolicy | PersonalizedRewardModel


@dataclass
class StepResult:
    """This rank's sums over its rows, and what all ranks agree on."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    num_rows: int = 0
    num_tokens: int = 0
    grad_norm: Tensor | None = None
    skipped: bool = False
    mean_loss: float | None = None  # over the global rows, where a limit was given


def accumulate_gradients_(
    model: Model,
    objective: Objective,
    batches: Sequence[Batch],
    *,
    reference_of: Callable[[Batch], ReferenceLogps | None],
    num_global_rows: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> StepResult:
    """Backward over this rank's micro-batches; gradients are those of the global mean once summed over ranks."""
    result = StepResult()
    kl = None
    if objective.is_unpaired:
        kl = estimate_kl(
            cast(PersonalizedPolicy, model),
            objective,
            cast(Sequence[LabelledBatch], batches),
            reference_of=reference_of,
            num_global_rows=num_global_rows,
            autocast=autocast,
        )
    passes = objective.passes()
    kls = len(passes) * [kl] if kl is None or len(passes) == 1 else kl.split(1)
    for batch in batches:
        sums: dict[str, Tensor] = {}
        with autocast():
            reference = reference_of(batch)
        for part, own_kl in zip(passes, kls, strict=True):
            with autocast():
                row_losses = part(model, batch, reference, own_kl)
            loss = row_losses.losses.sum() / num_global_rows
            (0 * loss if batch.is_idle else loss).backward()
            sums = {**row_losses.sums, **sums, "loss": row_losses.sums["loss"] + sums.get("loss", 0)}
        if batch.is_idle:
            continue
        for name, value in sums.items():
            result.sums[name] = result.sums[name] + value if name in result.sums else value
        result.num_rows += batch.num_rows
        result.num_tokens += batch.num_tokens
    return result


def train_step_(
    model: Model,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batches: Sequence[Batch],
    *,
    reference_of: Callable[[Batch], ReferenceLogps | None],
    num_global_rows: int,
    max_grad_norm: float,
    autocast: Callable[[], AbstractContextManager[object]],
    max_loss: float | None = None,
) -> StepResult:
    """Accumulate, reduce over ranks, clip, and step, unless loss or gradient is not finite on any rank.

    A non-finite gradient anywhere is non-finite everywhere after the sum over ranks, so every rank decides alike;
    a skipped step leaves parameters and optimizer state bitwise unchanged.

    Args:
        max_loss: a step whose mean loss over the global rows is above is skipped, too; None for no limit.
    """
    result = accumulate_gradients_(
        model, objective, batches, reference_of=reference_of, num_global_rows=num_global_rows, autocast=autocast
    )
    parameters = list(model.trainable().values())
    reach("after_backward", parameters=parameters)
    all_reduce_gradients_(parameters)
    result.grad_norm = clip_gradients_(parameters, max_grad_norm)
    loss = result.sums.get("loss", result.grad_norm)
    result.skipped = all_reduce_any(not bool(torch.isfinite(loss) & torch.isfinite(result.grad_norm)))
    if max_loss is not None:
        total = loss.detach().cpu().double().reshape(1) if result.num_rows else torch.zeros(1, dtype=torch.float64)
        result.mean_loss = all_reduce_sum(total).item() / num_global_rows
        result.skipped = result.skipped or result.mean_loss > max_loss
    reach("before_optimizer")
    if not result.skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result
