"""ORPO: the SFT loss and an odds-ratio term in place of a reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf.losses.pairwise import PreferenceLoss
from prlhf.losses.simpo import mean_logps

SURE = 1e-7  # nats a token: nearer to 0 float32 does not tell 1 - p

def orpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, *, beta: float
) -> PreferenceLoss:
    """ORPO loss of each preference pair, unreduced.

    loss = -log pi(y1|x) / |y1| + beta orpo_term

    Args:
        chosen_logps: as for `orpo_term`, and so are the other three.
        beta: weight of the odds-ratio term, lambda in the paper, > 0; 0.1 to 1 is usual.
    Returns: PreferenceLoss; the rewards are beta times the log odds, detached.
    Raises: ValueError: shapes differ or are not (B,), a length below 1, or beta <= 0.
    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6.
    """
    chosen, rejected = mean_logps(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    if not beta > 0:
        raise ValueError(f"beta: got {beta}, expected > 0")
    terms = orpo_term(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    rewards = (beta * _log_odds(logps.detach()) for logps in (chosen, rejected))
    return PreferenceLoss(-chosen + beta * terms, *rewards)


def orpo_term(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    """Odds-ratio term of each preference pair, unreduced.

    term = -log sigmoid(log odds(y1|x) - log odds(y2|x)),  odds = p / (1 - p),  p = exp(log pi(y|x) / |y|)

    Args:
        chosen_logps: (B,) float32, nats, summed over response tokens, below 0; so is rejected_logps.
        chosen_lengths: (B,) int64, response tokens, at least 1; so is rejected_lengths.
    Returns: (B,); the loss of the paper is the chosen response's NLL per token plus lambda times this.
    Raises: ValueError: shapes differ or are not (B,), or a length below 1.
    Source: Hong et al. 2024, arXiv:2403.07691, eq. 7.
    """
    chosen, rejected = mean_logps(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    return -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logps: Tensor) -> Tensor:
    """log p - log(1 - p); 1 - p by expm1, since 1 - exp(logp) would be 0 for a sure token in float32.

    Float32 log-probs also come out as 0 exactly, where the odds are infinite: such a response gets no gradient.
    """
    logps = logps.clamp(max=-SURE)
    return logps - torch.log(-torch.expm1(logps))
