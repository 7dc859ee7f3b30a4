"""The KL estimate that KTO compares every row with, over the rows of the global step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from prlhf.data.collate import LabelledBatch
from prlhf.distributed import all_reduce_sum
from prlhf.engine.objective import Objective, ReferenceLogps
from prlhf.models.policy import PersonalizedPolicy


@torch.no_grad()
def estimate_kl(
    policy: PersonalizedPolicy,
    objective: Objective,
    batches: Sequence[LabelledBatch],
    *,
    reference_of: Callable[[Any], ReferenceLogps | None],
    num_global_rows: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    """Mean log-ratio of policy to reference on mismatched responses, over the rows of all ranks' micro-batches.

    It is taken before any of the step's losses, so that the loss of a row does not depend on how the global batch is
    cut into micro-batches and ranks. Every rank calls this, also one without rows.

    Returns: (number of terms,) float32 nats, at least 0, in the order of `objective.terms`.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.2.
    """
    sums = torch.zeros(len(objective.terms), device=policy.device)
    for batch in batches:
        with autocast():
            reference = reference_of(batch)
            assert reference is not None
            terms = policy.term_values(batch.mismatched, objective.read_as(batch))
        if batch.is_idle:
            continue
        for i, (logps, _) in enumerate(terms):
            sums[i] += (logps - reference.rejected).sum()
    return (all_reduce_sum(sums) / num_global_rows).clamp(min=0)
