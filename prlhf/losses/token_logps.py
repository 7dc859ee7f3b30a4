"""Log-probability of given tokens under a linear output layer, without all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_LOGITS = 2**22  # 16 MiB in float32: a chunk stays near the caches, and its matmuls are still large
CHUNK_TOKENS = 128  # at least: the layer, which no cache holds, is read once a chunk
BACKWARD_CHUNKS = 4  # at once for a trained layer, whose gradient, as large as the layer, is passed over for each


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_logits: int | None = None,
) -> Tensor:
    """log softmax(softcap * tanh(scale * (hidden W^T + b) / softcap)) at each target, a chunk of tokens at a time.

    The gradient of a log-prob with respect to its hidden state does not depend on the loss, so it is kept from the
    forward pass, (S, D); only a trained W needs its logits again in backward.

    Args:
        hidden: (S, D).
        weight: (V, D).
        bias: (V,) or None.
        targets: (S,) int64.
        scale: of the logits.
        softcap: of the scaled logits; None leaves them as they are.
        chunk_logits: how many logits may exist at once (one token's at least), four times as many in backward; by
            default 4 M, and those of 128 tokens where that is more, in backward as well.
    Returns: (S,) float32, nats (float64 for float64 input).
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    least, logits = (CHUNK_TOKENS, CHUNK_LOGITS) if chunk_logits is None else (1, chunk_logits)
    rows = tuple(max(least, chunks * logits // weight.shape[0]) for chunks in (1, BACKWARD_CHUNKS))
    with torch.autocast(device_type, enabled=False):
        return _TokenLogps.apply(hidden, weight, bias, targets, scale, softcap, rows)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        rows: tuple[int, int],
    ) -> Tensor:
        """Log-probs, and their slopes in the hidden states where those are wanted."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows[0]):
            chunk = slice(start, start + rows[0])
            probs, logps[chunk], bend = _softmax(hidden[chunk], weight, bias, targets[chunk], scale, softcap)
            if slopes is None:
                continue
            if bend is None:
                slopes[chunk] = weight[targets[chunk]] - probs.to(hidden.dtype) @ weight
            else:
                d_logits = _residuals_(probs, targets[chunk], torch.ones_like(logps[chunk]), bend)
                slopes[chunk] = d_logits.to(hidden.dtype) @ weight
        ctx.save_for_backward(hidden, weight, bias, targets, slopes)
        ctx.scale, ctx.softcap, ctx.rows = scale, softcap, rows[1]
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states, and of a trained layer from logits made again."""
        hidden, weight, bias, targets, slopes = ctx.saved_tensors
        (grad,) = grads
        d_hidden = None if slopes is None else slopes * grad.to(slopes.dtype)[:, None]
        if not any(ctx.needs_input_grad[1:3]):
            return d_hidden, *(None,) * 6
        d_weight = torch.zeros_like(weight, dtype=grad.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        for start in range(0, len(hidden), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            probs, _, bend = _softmax(hidden[chunk], weight, bias, targets[chunk], ctx.scale, ctx.softcap)
            d_logits = _residuals_(probs, targets[chunk], grad[chunk], bend)
            if hidden.dtype == d_weight.dtype:
                d_weight.addmm_(d_logits.T, hidden[chunk])
            else:
                d_weight += (d_logits.to(hidden.dtype).T @ hidden[chunk]).to(grad.dtype)
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight.to(weight.dtype), d_bias, *(None,) * 4


def _residuals_(probs: Tensor, targets: Tensor, grad: Tensor, bend: Tensor | float | None) -> Tensor:
    """Gradient of the layer's output (S, V), in the place of the probabilities, from that of the log-probs (S,)."""
    d_logits = probs.mul_(-grad[:, None]).scatter_add_(1, targets[:, None], grad[:, None])
    return d_logits if bend is None else d_logits.mul_(bend)


def _softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | float | None]:
    """Probabilities (S, V) and the targets' log-probs (S,), in float32 at least, and the logits' slope in the output
    of the layer: (S, V), the scale, or None for 1.
    """
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    bend: Tensor | float | None = None
    if softcap is not None:
        bend = logits.mul_(scale / softcap).tanh_()
        logits = bend * softcap
        bend.square_().neg_().add_(1).mul_(scale)
    elif scale != 1:
        logits *= scale
        bend = scale
    logits -= logits.amax(dim=1, keepdim=True)
    scores = logits.gather(1, targets[:, None])[:, 0]
    total = logits.exp_().sum(dim=1, keepdim=True)
    return logits.div_(total), scores - total[:, 0].log(), bend
