"""Log-probability of each row's response under a causal LM's logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def response_logps(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Log-probability of each row's response, summed over its tokens.

    The logits at position t score the token at t + 1: the shift is made here, so logits and labels share the positions
    of the input ids, and the label at position 0 is never scored.

    Args:
        logits: (B, L, V), any floating type; the softmax is taken in float32 at least.
        labels: (B, L) int64: the input ids on the response, `ignore_index` elsewhere.
        ignore_index: the label of a position that is not scored.
    Returns: (B,) float32, nats (float64 for float64 logits); 0 for a row with no scored token.
    Raises: ValueError: the shapes do not fit together.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"response_logps: got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}, "
            "expected (B, L, V) and (B, L); do not shift them before the call"
        )
    # A sum of hundreds of bfloat16 terms would lose the difference between chosen and rejected.
    scores = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels[:, 1:]
    nll = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="none")
    return -nll.view(targets.shape).sum(dim=1)


def response_token_counts(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Number of tokens that `response_logps` scores in each row.

    Args:
        labels: (B, L) int64, as given to `response_logps`.
        ignore_index: the label of a position that is not scored.
    Returns: (B,) int64.
    Raises: ValueError: labels are not (B, L).
    """
    if labels.dim() != 2:
        raise ValueError(f"response_token_counts: got labels {tuple(labels.shape)}, expected (B, L)")
    return (labels[:, 1:] != ignore_index).sum(dim=1)
