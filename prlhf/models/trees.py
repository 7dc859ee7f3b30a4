"""A pack's trees, and the plain way to attend over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Span = tuple[int, int]


@dataclass(frozen=True)
class Trees:
    """Lengths of the trees of a pack, in order; a tree has at least one response.

    Args:
        prefixes: tokens of each tree's prefix, soft prompt included; may be 0.
        responses: tokens of each response of each tree, all above 0.
    """

    prefixes: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @cached_property
    def spans(self) -> list[tuple[Span, list[Span]]]:
        """(start, end) of each tree's prefix and of its responses on the line."""
        spans, start = [], 0
        for prefix, responses in zip(self.prefixes, self.responses, strict=True):
            end = start + prefix
            parts = []
            for length in responses:
                parts.append((end, end + length))
                end += length
            spans.append(((start, start + prefix), parts))
            start = end
        return spans

    @property
    def num_tokens(self) -> int:
        """N, the length of the line."""
        return sum(self.prefixes) + sum(map(sum, self.responses))

    @property
    def longest_path(self) -> int:
        """Most tokens that one response and its prefix have together."""
        return max(prefix + max(responses) for prefix, responses in zip(self.prefixes, self.responses, strict=True))

    def make_intervals(self) -> np.ndarray:
        """Which positions each of N tokens sees, (3, N) int32: those in [first, end), and those in [own, itself].

        [first, end) is a response's prefix, and empty for the prefix's tokens; `own` is where the token's part starts.
        """
        parts, lengths = [], []
        for (start, end), responses in self.spans:
            parts += [(start, start, start), *((start, end, own) for own, _ in responses)]
            lengths += [end - start, *(stop - own for own, stop in responses)]
        return np.repeat(np.array(parts, dtype=np.int32).T, lengths, axis=1)


def spread_heads(query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Keys and values (1, H, N, E) of every query head, from (1, H / G, N, E) of groups of G heads."""
    groups = query.shape[1] // others[0].shape[1]
    return tuple(x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in others)


def masked_tree_attention(query: Tensor, key: Tensor, value: Tensor, trees: Trees, scale: float) -> Tensor:
    """Causal attention in which a response sees its tree's prefix and itself, by a dense mask of each tree.

    For every device, and the oracle of the faster ways.

    Args:
        query: (1, H, N, E).
        key: (1, H / G, N, E), a head for G of the queries'.
        value: as key.
        trees: of N tokens.
        scale: of the products before the softmax.
    Returns: (1, N, H, E).
    """
    key, value = spread_heads(query, key, value)
    outputs = []
    for (start, _), responses in trees.spans:
        last = responses[-1][1]
        length = last - start
        # 0 in the prefix, 1, 2, ... in the responses.
        part = torch.zeros(length, dtype=torch.int64, device=query.device)
        for number, span in enumerate(responses, 1):
            part[span[0] - start : span[1] - start] = number
        order = torch.arange(length, device=query.device)
        mask = (order[:, None] >= order) & ((part == 0) | (part[:, None] == part))
        q, k, v = (x[:, :, start:last] for x in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
    return torch.cat(outputs, dim=2).transpose(1, 2)
