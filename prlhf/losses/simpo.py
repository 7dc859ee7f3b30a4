"""SimPO: a preference loss on mean log-probs, without a reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from prlhf.losses.pairwise import PreferenceLoss, check_row_shapes


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
) -> PreferenceLoss:
    """SimPO loss of each preference pair, unreduced.

    loss = -log sigmoid(beta log pi(y1|x) / |y1| - beta log pi(y2|x) / |y2| - gamma)

    Args:
        chosen_logps: (B,) float32, nats, summed over response tokens; so is rejected_logps.
        chosen_lengths: (B,) int64, response tokens, at least 1; so is rejected_lengths.
        beta: scale of the mean log-probs, > 0; 2 to 2.5 is usual.
        gamma: margin that the chosen response is to win by, >= 0; 0.3 to 1.6 is usual.
    Returns: PreferenceLoss; the rewards are beta times the mean log-probs, detached.
    Raises: ValueError: shapes differ or are not (B,), a length below 1, beta <= 0 or gamma < 0.
    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    chosen, rejected = mean_logps(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    if not beta > 0:
        raise ValueError(f"beta: got {beta}, expected > 0")
    if not gamma >= 0:
        raise ValueError(f"gamma: got {gamma}, expected 0 or more")
    losses = -F.logsigmoid(beta * (chosen - rejected) - gamma)
    return PreferenceLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def mean_logps(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs per token of both responses, (B,) each.

    Raises: ValueError: shapes differ or are not (B,), or a length below 1, which has no mean.
    """
    check_row_shapes(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    for name, lengths in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
        if (lengths < 1).any():
            raise ValueError(f"{name}: got {int(lengths.min())}, expected 1 or more: an empty response has no mean")
    return chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
