"""Log-probability of given tokens under a linear output layer, without all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_LOGITS = 2**22  # 16 MiB in float32: a chunk stays near the caches, and its matmuls are still large
BACKWARD_CHUNKS = 4  # at once for a trained layer, whose gradient, as large as the layer, is passed over for each


def linear_token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk_logits: int = CHUNK_LOGITS
) -> Tensor:
    """log softmax(hidden W^T + b) at each target, computed a chunk of tokens at a time.

    The gradient of a log-prob with respect to its hidden state does not depend on the loss, so it is kept from the
    forward pass, (S, D); only a trained W needs its logits again in backward.

    Args:
        hidden: (S, D).
        weight: (V, D).
        bias: (V,) or None.
        targets: (S,) int64.
        chunk_logits: how many logits may exist at once (one token's at least), four times as many in backward.
    Returns: (S,) float32, nats (float64 for float64 input).
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rows = max(1, chunk_logits // weight.shape[0])
    with torch.autocast(device_type, enabled=False):
        return _TokenLogps.apply(hidden, weight, bias, targets, rows)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int
    ) -> Tensor:
        """Log-probs, and their slopes in the hidden states where those are wanted."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            probs, logps[chunk] = _softmax(hidden[chunk], weight, bias, targets[chunk])
            if slopes is not None:
                slopes[chunk] = weight[targets[chunk]] - probs.to(hidden.dtype) @ weight
        ctx.save_for_backward(hidden, weight, bias, targets, slopes)
        ctx.rows = rows
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states, and of a trained layer from logits made again."""
        hidden, weight, bias, targets, slopes = ctx.saved_tensors
        (grad,) = grads
        d_hidden = None if slopes is None else slopes * grad.to(slopes.dtype)[:, None]
        if not any(ctx.needs_input_grad[1:3]):
            return d_hidden, None, None, None, None
        d_weight = torch.zeros_like(weight, dtype=grad.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        rows = BACKWARD_CHUNKS * ctx.rows
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            probs, _ = _softmax(hidden[chunk], weight, bias, targets[chunk])
            d_logits = probs.mul_(-grad[chunk, None])
            d_logits.scatter_add_(1, targets[chunk, None], grad[chunk, None])
            if hidden.dtype == d_weight.dtype:
                d_weight.addmm_(d_logits.T, hidden[chunk])
            else:
                d_weight += (d_logits.to(hidden.dtype).T @ hidden[chunk]).to(grad.dtype)
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
        return d_hidden, d_weight.to(weight.dtype), None if d_bias is None else d_bias.to(bias.dtype), None, None


def _softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (S, V) and the targets' log-probs (S,), in float32 at least."""
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    logits -= logits.amax(dim=1, keepdim=True)
    scores = logits.gather(1, targets[:, None])[:, 0]
    total = logits.exp_().sum(dim=1, keepdim=True)
    return logits.div_(total), scores - total[:, 0].log()
