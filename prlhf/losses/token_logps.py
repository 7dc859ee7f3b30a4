"""Log-probability of given tokens under a linear output layer, without all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 2**24  # 64 MiB in float32: smaller matmuls are slower, larger ones no faster
CHUNK_TOKENS = 128  # at least: the layer, which no cache holds, is read once a chunk
KEPT_LOGITS = 2**26  # for a trained layer's gradient: at most 256 MiB in float32, whatever the rows and vocabulary


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_logits: int | None = None,
    kept_logits: int = KEPT_LOGITS,
) -> Tensor:
    """log softmax(softcap * tanh(scale * (hidden W^T + b) / softcap)) at each target, a chunk of tokens at a time.

    The gradient of a log-prob with respect to its hidden state does not depend on the loss, so it is kept from the
    forward pass, (S, D); only a trained W needs its logits again in backward, where those that were not kept are made
    anew.

    Args:
        hidden: (S, D).
        weight: (V, D).
        bias: (V,) or None.
        targets: (S,) int64.
        scale: of the logits.
        softcap: of the scaled logits; None leaves them as they are.
        chunk_logits: how many logits may exist at once (one token's at least); by default 16 M, and those of 128
            tokens where that is more.
        kept_logits: how many may be kept besides for the backward pass of a trained layer, in whole chunks.
    Returns: (S,) float32, nats (float64 for float64 input).
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    least, logits = (CHUNK_TOKENS, CHUNK_LOGITS) if chunk_logits is None else (1, chunk_logits)
    chunk = max(least, logits // weight.shape[0])
    with torch.autocast(device_type, enabled=False):
        return _TokenLogps.apply(hidden, weight, bias, targets, scale, softcap, chunk, kept_logits)


class _TokenLogps(torch.autograd.Function):
    """With z a token's logits and e = exp(z - max z), all that gradients need is r = e - sum(e) onehot(target)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
        kept_logits: int,
    ) -> Tensor:
        """Log-probs, and their slopes in the hidden states where those are wanted."""
        totals = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        logps = torch.empty_like(totals)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        num_kept = kept_logits // (chunk * len(weight)) if any(ctx.needs_input_grad[1:3]) else 0
        outputs = _memory(hidden, weight, chunk, num_kept)
        for part, output in zip(_chunks(hidden, chunk), outputs, strict=True):
            _layer_(output, hidden[part], weight, bias)
            logps[part], totals[part] = _residuals_(output, targets[part], scale, softcap)
            if slopes is not None:
                slopes[part] = (output @ weight) / -totals[part, None]
        ctx.save_for_backward(hidden, weight, bias, targets, slopes, totals, *outputs[:num_kept])
        ctx.scale, ctx.softcap, ctx.chunk = scale, softcap, chunk
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states, and of a trained layer from residuals that were kept or are made again."""
        hidden, weight, bias, targets, slopes, totals, *kept = ctx.saved_tensors
        (grad,) = grads
        d_hidden = None if slopes is None else slopes * grad.to(slopes.dtype)[:, None]
        if not any(ctx.needs_input_grad[1:3]):
            return d_hidden, *(None,) * 7
        shares = grad / -totals
        weighted = (shares[:, None] * hidden).to(hidden.dtype)
        d_weight = torch.zeros_like(weight, dtype=grad.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        outputs = kept + _memory(hidden[len(kept) * ctx.chunk :], weight, ctx.chunk, 0)
        for number, (part, output) in enumerate(zip(_chunks(hidden, ctx.chunk), outputs, strict=True)):
            if number >= len(kept):
                _layer_(output, hidden[part], weight, bias)
                _residuals_(output, targets[part], ctx.scale, ctx.softcap)
            if output.dtype == d_weight.dtype:
                d_weight.addmm_(output.T, weighted[part])
            else:
                d_weight += output.T @ weighted[part]
            if d_bias is not None:
                d_bias += shares[part] @ output.to(shares.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight.to(weight.dtype), d_bias, *(None,) * 5


def _chunks(hidden: Tensor, size: int) -> list[slice]:
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def _memory(hidden: Tensor, weight: Tensor, size: int, num_kept: int) -> list[Tensor]:
    """A place for each chunk's output, (tokens, V): one of its own for those to be kept, the same for all others."""
    lengths = [part.stop - part.start for part in _chunks(hidden, size)]
    own = [hidden.new_empty(length, len(weight)) for length in lengths[: num_kept + 1]]
    return [*own[:num_kept], *(own[-1][:length] for length in lengths[num_kept:])]


def _layer_(output: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Fill the output (S, V) of the layer."""
    if bias is None:
        torch.mm(hidden, weight.T, out=output)
    else:
        torch.addmm(bias, hidden, weight.T, out=output)


def _residuals_(output: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Put r of each token, times the slope of its logits in the output, in the place of the layer's output (S, V).

    Returns: log-probs of the targets and sums of e, both (S,) and in float32 at least.
    """
    logits = output.to(torch.promote_types(output.dtype, torch.float32))
    bend: Tensor | float | None = None
    if softcap is not None:
        bend = logits.mul_(scale / softcap).tanh_()
        logits = bend * softcap
        bend.square_().neg_().add_(1).mul_(scale)
    elif scale != 1:
        logits *= scale
        bend = scale
    logits -= logits.amax(dim=1, keepdim=True)
    places = targets[:, None]
    scores = logits.gather(1, places)
    totals = logits.exp_().sum(dim=1, keepdim=True)
    logits.scatter_add_(1, places, -totals)
    if bend is not None:
        logits *= bend
    if logits is not output:
        output.copy_(logits)
    return (scores - totals.log())[:, 0], totals[:, 0]
