"""KTO: a loss for single responses with a thumb up or down."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.losses.pairwise import check_row_shapes


class UnpairedLoss(NamedTuple):
    """Loss and implicit reward of each response: two (B,) tensors, the rewards detached."""

    losses: Tensor
    rewards: Tensor


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """KTO loss of each response, unreduced.

    loss = w_D (1 - sigmoid(beta (r - z))) for a thumb up, w_U (1 - sigmoid(beta (z - r))) for a thumb down,
    r = log pi(y|x) - log pi_ref(y|x),  z = an estimate of KL(pi || pi_ref), at least 0, without gradient

    Args:
        policy_logps: (B,) float32, nats, summed over response tokens; so is reference_logps.
        labels: (B,) bool, True for a thumb up.
        kl: scalar z in nats; clamped at 0 and detached here.
        beta: inverse temperature, > 0; 0.1 is usual.
        desirable_weight: w_D, weight of thumbs up; choose w_D n_D / (w_U n_U) from 1 to 3/2.
    Returns: UnpairedLoss; rewards are beta r.
    Raises: ValueError: shapes differ or are not (B,), labels that are no bool, beta <= 0, a negative weight.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, the KTO loss.
    """
    check_row_shapes(policy_logps=policy_logps, reference_logps=reference_logps, labels=labels)
    if labels.dtype != torch.bool:
        raise ValueError(f"labels: got {labels.dtype}, expected torch.bool")
    if not beta > 0:
        raise ValueError(f"beta: got {beta}, expected > 0")
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(f"weights: got {desirable_weight} and {undesirable_weight}, expected 0 or more")
    ratios = policy_logps - reference_logps
    baseline = torch.as_tensor(kl, dtype=ratios.dtype, device=ratios.device).detach().clamp(min=0)
    # 1 - sigmoid(a) = sigmoid(-a)
    up = desirable_weight * torch.sigmoid(beta * (baseline - ratios))
    down = undesirable_weight * torch.sigmoid(beta * (ratios - baseline))
    return UnpairedLoss(torch.where(labels, up, down), beta * ratios.detach())
