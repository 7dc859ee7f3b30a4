"""Direct preference optimisation."""

from __future__ import annotations

from torch import Tensor

from prlhf.losses.pairwise import PairwiseKind, PreferenceLoss, check_row_shapes, compute_pairwise_losses


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    kind: PairwiseKind = "sigmoid",
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """DPO loss of each preference pair, unreduced.

    loss = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h),  h = policy margin - reference margin
    (kind `ipo`: (h - 1 / (2 beta))^2)

    Args:
        policy_chosen_logps: (B,) float32, nats, summed over response tokens; so are the other three.
        beta: inverse temperature, > 0; 0.1 to 0.5 is usual.
        kind: the function of the margin, see `pairwise.PAIRWISE_LOSSES`.
        label_smoothing: eps, assumed share of wrong labels, in [0, 0.5); `sigmoid` and `robust` only.
    Returns: PreferenceLoss of (B,) tensors; rewards are beta log(policy / reference), detached.
    Raises: ValueError: shapes differ or are not (B,), an unknown kind, beta or label_smoothing out of range.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    check_row_shapes(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    margins = chosen_logratios - rejected_logratios
    return PreferenceLoss(
        losses=compute_pairwise_losses(margins, beta=beta, kind=kind, label_smoothing=label_smoothing),
        chosen_rewards=beta * chosen_logratios.detach(),
        rejected_rewards=beta * rejected_logratios.detach(),
    )
