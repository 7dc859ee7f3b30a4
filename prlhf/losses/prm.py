"""Losses of reward models: Bradley-Terry, and P-RM with the user's own term and the generic user's, row by row."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from prlhf.losses.pairwise import PreferenceLoss, check_row_shapes
from prlhf.losses.pdpo import PersonalizedLoss, mix_terms


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> PreferenceLoss:
    """Bradley-Terry loss of each preference pair, unreduced.

    loss = -log sigmoid(r(x, y1) - r(x, y2))

    Args:
        chosen_scores: (B,) rewards of the chosen responses; so is rejected_scores.
    Returns: PreferenceLoss of (B,) tensors; the rewards are the scores, detached.
    Raises: ValueError: shapes differ or are not (B,).
    Source: Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
    """
    check_row_shapes(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    losses = -F.logsigmoid(chosen_scores - rejected_scores)
    return PreferenceLoss(losses, chosen_scores.detach(), rejected_scores.detach())


def prm_loss(
    individual_chosen_scores: Tensor,
    individual_rejected_scores: Tensor,
    generic_chosen_scores: Tensor,
    generic_rejected_scores: Tensor,
    *,
    alpha: float,
) -> PersonalizedLoss:
    """P-RM loss of each preference pair, unreduced.

    loss = alpha l(r_u(y1) - r_u(y2)) + (1 - alpha) l(r_u0(y1) - r_u0(y2)),  l(d) = -log sigmoid(d)

    Args:
        individual_chosen_scores: (B,) rewards as the row's user; so is _rejected_.
        generic_chosen_scores: the same with the generic user's soft prompt; user text stays.
        alpha: weight of the individual term, in [0, 1]; at 0 the user's own offset gets exactly no gradient.
    Returns: PersonalizedLoss; `losses` is what is trained, the terms are for metrics.
    Raises: ValueError: shapes differ or are not (B,), or alpha out of range.
    Source: Li et al. 2024, arXiv:2402.05133, the P-RM objective.
    """
    check_row_shapes(
        individual_chosen_scores=individual_chosen_scores,
        individual_rejected_scores=individual_rejected_scores,
        generic_chosen_scores=generic_chosen_scores,
        generic_rejected_scores=generic_rejected_scores,
    )
    return mix_terms(
        bradley_terry_loss(individual_chosen_scores, individual_rejected_scores),
        bradley_terry_loss(generic_chosen_scores, generic_rejected_scores),
        alpha=alpha,
    )
