"""Attention over trees on a GPU: one call of torch's FlexAttention for a pack, without a mask of all pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from prlhf.models.trees import Trees, masked_tree_attention

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)  # ROCm has that name, too; on CPU and MPS FlexAttention has no gradient
BLOCK = 128  # positions; a block of queries and keys is skipped where none sees another
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative L2, far above rounding
# For the first length torch compiles a kernel of that length, for the second one of any length: both are tried. Neither
# the lengths nor the numbers of blocks may agree.
PROBES = (Trees((150, 0, 40), ((60, 90), (70,), (9, 30, 5))), Trees((300,), ((240, 110),)))


class Heads(NamedTuple):
    """What a kernel is compiled for."""

    device: torch.device
    dtype: torch.dtype
    num_query_heads: int
    num_key_heads: int
    dim: int


def is_served(query: Tensor, key: Tensor) -> bool:
    """Whether `flex_tree_attention` may be called: tried once for each kind of heads; a refusal is logged.

    A pack within one block is not worth a kernel of its own.

    Args:
        query: (1, H, N, E).
        key: (1, H / G, N, E).
    """
    if query.device.type not in DEVICES or query.shape[2] <= BLOCK:
        return False
    return _refusal(Heads(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3])) is None


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, trees: Trees, scale: float) -> Tensor:
    """As `masked_tree_attention`; arguments and result are the same."""
    output = _kernel()(
        query,
        key,
        value,
        block_mask=make_block_mask(trees, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"BACKEND": "TRITON"},  # never the ones that only some lengths or installations get
    )
    return output.transpose(1, 2)


@lru_cache(maxsize=2)  # all layers of a pack ask, in forward and again where activations are recomputed
def make_block_mask(trees: Trees, device: torch.device) -> BlockMask:
    """Blocks of N queries and N keys that see each other in whole or in part; takes N^2 / `BLOCK` numbers.

    `create_block_mask` would give the same from a mask of all pairs.
    """
    first, end, own = torch.from_numpy(trees.make_intervals()).to(device)
    length, num_blocks = trees.num_tokens, -(-trees.num_tokens // BLOCK)
    edges = BLOCK * torch.arange(num_blocks, dtype=torch.int32, device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((first[query] <= key) & (key < end[query])) | ((own[query] <= key) & (key <= query))

    def count(start: Tensor, stop: Tensor) -> Tensor:
        """Positions of each block in [start, stop), (N, blocks)."""
        return (torch.minimum(stop[:, None], edges + BLOCK) - torch.maximum(start[:, None], edges)).clamp(min=0)

    num_seen = count(first, end) + count(own, torch.arange(1, length + 1, dtype=torch.int32, device=device))
    num_seen = F.pad(num_seen, (0, 0, 0, num_blocks * BLOCK - length)).view(num_blocks, BLOCK, num_blocks)
    whole = (num_seen == BLOCK).all(dim=1)
    partial = (num_seen > 0).any(dim=1) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of (blocks, blocks) each row has, (1, 1, blocks), and which, first (1, 1, blocks, blocks)."""
    columns = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


@cache
def _kernel() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


@cache
def _refusal(heads: Heads) -> str | None:
    """Why heads are not served; None if they are."""
    if heads.dtype not in TOLERANCE:
        refusal: str | None = f"no kernel computes in {heads.dtype}"
    else:
        try:
            refusal = _probe(heads)
        except Exception as problem:  # no compiler, an old GPU, a head size without kernel: torch raises anything
            refusal = f"{type(problem).__name__}: {problem}".splitlines()[0]
    if refusal is not None:
        logger.warning("packed rows of %s are attended to by dense masks, which is slower: %s", heads, refusal)
    return refusal


def _probe(heads: Heads) -> str | None:
    """What differs between this way and the masked one on random input; None if they agree."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads.num_query_heads, heads.num_key_heads, heads.num_key_heads, heads.num_query_heads)
    keep = saved_tensors_hooks(lambda x: x, lambda x: x)  # hidden from a checkpoint around the layer that asks
    for trees in PROBES:
        query, key, value, upstream = (
            torch.randn(1, trees.num_tokens, count, heads.dim, generator=generator).to(heads.device, heads.dtype)
            for count in counts
        )
        inputs = [x.transpose(1, 2).requires_grad_() for x in (query, key, value)]
        results = []
        with torch.enable_grad(), torch.autocast(heads.device.type, enabled=False), keep:
            for attend in (flex_tree_attention, masked_tree_attention):
                output = attend(inputs[0], inputs[1], inputs[2], trees, heads.dim**-0.5)
                results.append([output, *torch.autograd.grad(output, inputs, upstream)])
        pairs = [(x.detach().float(), y.detach().float()) for x, y in zip(*results, strict=True)]
        differences = [float((x - y).norm() / y.norm()) for x, y in pairs]
        if not all(difference < TOLERANCE[heads.dtype] for difference in differences):
            return f"FlexAttention's output or gradients are off by {max(differences):.1e}"
    return None
