"""The odds-ratio term of ORPO, added to the SFT loss in place of a reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf.losses.simpo import mean_logps


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
    """log p - log(1 - p); 1 - p by expm1, since 1 - exp(logp) would be 0 for a sure token in float32."""
    return logps - torch.log(-torch.expm1(logps))
