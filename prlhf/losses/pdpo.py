"""Personalized direct preference optimisation: the user's own term and the generic user's, row by row."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from prlhf.losses.dpo import dpo_loss
from prlhf.losses.pairwise import PairwiseKind, PreferenceLoss


class PersonalizedLoss(NamedTuple):
    """Loss of each pair, (B,), and the two terms it is the weighted sum of."""

    losses: Tensor
    individual: PreferenceLoss
    generic: PreferenceLoss


def pdpo_loss(
    individual_chosen_logps: Tensor,
    individual_rejected_logps: Tensor,
    generic_chosen_logps: Tensor,
    generic_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    alpha: float,
    beta: float,
    kind: PairwiseKind = "sigmoid",
    label_smoothing: float = 0.0,
) -> PersonalizedLoss:
    """P-DPO loss of each preference pair, unreduced.

    loss = alpha l(h_u) + (1 - alpha) l(h_u0),  l the DPO loss, h_u the margin as user u, h_u0 as the generic user

    Args:
        individual_chosen_logps: (B,) float32, nats, summed over response tokens, as the row's user; so is _rejected_.
        generic_chosen_logps: the same with the generic user's soft prompt; user text stays.
        reference_chosen_logps: the same of the starting policy with no soft prompt; one for both terms.
        alpha: weight of the individual term, in [0, 1]; at 0 the user's own offset gets exactly no gradient.
        beta: inverse temperature, > 0; 0.1 to 0.5 is usual.
        kind: the function of the margin in both terms, see `pairwise.PAIRWISE_LOSSES`.
        label_smoothing: assumed share of wrong labels, in [0, 0.5); `sigmoid` and `robust` only.
    Returns: PersonalizedLoss; `losses` is what is trained, the terms are for metrics.
    Raises: ValueError: shapes differ or are not (B,), an unknown kind, alpha, beta or label_smoothing out of range.
    Source: Li et al. 2024, arXiv:2402.05133, the P-DPO objective.
    """
    reference = (reference_chosen_logps, reference_rejected_logps)
    individual = dpo_loss(
        individual_chosen_logps,
        individual_rejected_logps,
        *reference,
        beta=beta,
        kind=kind,
        label_smoothing=label_smoothing,
    )
    generic = dpo_loss(
        generic_chosen_logps, generic_rejected_logps, *reference, beta=beta, kind=kind, label_smoothing=label_smoothing
    )
    return mix_terms(individual, generic, alpha=alpha)


def mix_terms(individual: PreferenceLoss, generic: PreferenceLoss, *, alpha: float) -> PersonalizedLoss:
    """alpha times the individual term plus 1 - alpha times the generic one, row by row.

    Raises: ValueError: alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, expected at least 0 and at most 1")
    return PersonalizedLoss(alpha * individual.losses + (1 - alpha) * generic.losses, individual, generic)
