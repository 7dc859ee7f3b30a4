"""Attention over trees: the responses to one prompt share its computation and see nothing of each other.

A pack is one line of N tokens, tree after tree; a tree is a prefix and the responses that follow it. The function here
is registered with transformers' AttentionInterface, so a backbone reads packs without a line of its code being copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prlhf.models.flex_trees import flex_tree_attention, is_served
from prlhf.models.trees import Trees, masked_tree_attention, spread_heads

ATTENTION = "prlhf_trees"
# Of torch's CPU kernel: they return the log-sum-exp, which merges two calls into one softmax. Private, so looked for.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
Window = tuple[slice, int]  # rows of a batch, and the first position that any of them has


def tree_attention(query: Tensor, key: Tensor, value: Tensor, trees: Trees, scale: float) -> Tensor:
    """As `masked_tree_attention`, the fastest way there is here; in autocast's type where that is on.

    The CPU merges mask-free calls, CUDA runs FlexAttention; elsewhere, and where these do not work, masks are dense.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if is_served(query, key):
        return flex_tree_attention(query, key, value, trees, scale)
    if query.device.type == "cpu" and _FLASH is not None and _FLASH_BACKWARD is not None:
        return _FlashTrees.apply(query, *spread_heads(query, key, value), trees, scale)
    return masked_tree_attention(query, key, value, trees, scale)


class _FlashTrees(torch.autograd.Function):
    """Three mask-free calls for a response beside the first: on itself, on its prefix, merged by log-sum-exp.

    The first response goes on causally after the prefix in one call. In backward the merged output and log-sum-exp
    stand in for those of the parts: the kernel then weighs each part's scores as the whole softmax did.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, trees: Trees, scale: float) -> Tensor:
        """(1, N, H, E)."""
        assert _FLASH is not None
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        output = out.transpose(1, 2)
        lse = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for (start, end), responses in trees.spans:
            first = slice(start, responses[0][1])
            output[:, :, first], lse[:, :, first] = _attend(query, key, value, first, first, True, scale)
            for span in responses[1:]:
                own, prefix = slice(*span), slice(start, end)
                part, part_lse = _attend(query, key, value, own, own, True, scale)
                if end > start:
                    other, other_lse = _attend(query, key, value, own, prefix, False, scale)
                    merged = torch.logaddexp(part_lse, other_lse)
                    part = part * (part_lse - merged).exp().unsqueeze(-1) + other * (
                        other_lse - merged
                    ).exp().unsqueeze(-1)
                    part_lse = merged
                output[:, :, own], lse[:, :, own] = part, part_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.trees, ctx.scale = trees, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, lse = ctx.saved_tensors
        dtype, given = query.dtype, grads[0]
        if dtype == torch.bfloat16:  # in which this kernel is slower than in float32
            query, key, value, out, given = (x.float() for x in (query, key, value, out, given))
        grad, output = given.transpose(1, 2), out.transpose(1, 2)
        # Laid out as the projections made them.
        d_query, d_key, d_value = (
            torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for x in (query, key, value)
        )

        def back(rows: slice, columns: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            """Gradients of the rows' queries and the columns' keys and values."""
            assert _FLASH_BACKWARD is not None
            q, k, v = query[:, :, rows], key[:, :, columns], value[:, :, columns]
            parts = (output[:, :, rows], lse[:, :, rows])
            return _FLASH_BACKWARD(grad[:, :, rows], q, k, v, *parts, 0.0, causal, scale=ctx.scale)

        for (start, end), responses in ctx.trees.spans:
            first, prefix = slice(start, responses[0][1]), slice(start, end)
            d_query[:, :, first], d_key[:, :, first], d_value[:, :, first] = back(first, first, True)
            for span in responses[1:]:
                own = slice(*span)
                d_query[:, :, own], d_key[:, :, own], d_value[:, :, own] = back(own, own, True)
                if end > start:
                    dq, dk, dv = back(own, prefix, False)
                    d_query[:, :, own] += dq
                    d_key[:, :, prefix] += dk
                    d_value[:, :, prefix] += dv
        return d_query.to(dtype), d_key.to(dtype), d_value.to(dtype), None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, rows: slice, columns: slice, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    assert _FLASH is not None
    return _FLASH(query[:, :, rows], key[:, :, columns], value[:, :, columns], 0.0, causal, scale=scale)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    trees: Trees | None = None,
    windows: Sequence[Window] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: trees where the caller gave some, scaled dot products otherwise.

    Args:
        windows: all rows of a left-padded batch, in order; pads that all rows of a window share are not read.
    """
    if windows is not None:
        assert attention_mask is not None
        parts = []
        for rows, first in windows:
            part = query[rows], key[rows, :, first:], value[rows, :, first:], attention_mask[rows, ..., first:]
            parts.append(sdpa_attention_forward(module, *part, scaling=scaling, **kwargs)[0])
        return torch.cat(parts), None
    if trees is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    window = kwargs.pop("sliding_window", None)
    unknown = sorted(k for k in _CHANGES_SCORES if kwargs.get(k) is not None)
    if unknown or (window is not None and trees.longest_path > window):
        raise ValueError(f"tree attention cannot serve {', '.join(unknown) or 'a sliding window'}")
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    return tree_attention(query, key, value, trees, scale), None


_CHANGES_SCORES = ("softcap", "s_aux", "position_bias", "head_mask")


def keep_attention_uncompiled() -> None:
    """From here on torch.compile leaves attention out: what it made of a block stays when trees or windows change."""
    AttentionInterface.register(ATTENTION, torch.compiler.disable(_attention))  # which takes a second to import


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
