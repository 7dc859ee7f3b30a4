"""Which rows a step trains on: pure functions of (seed, step), the same for every world size and after a resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def num_steps_per_epoch(num_rows: int, batch_rows: int) -> int:
    """Optimizer steps that show every row once; the last one may be smaller."""
    return -(-num_rows // batch_rows)


def global_batch(step: int, *, num_rows: int, batch_rows: int, seed: int) -> list[int]:
    """Rows of one optimizer step, over all ranks.

    Every epoch is a permutation of its own, cut into batches; only an epoch's last batch may be smaller.

    Args:
        step: 0-based, over all epochs.
    """
    return rows_of_steps(step, step + 1, num_rows=num_rows, batch_rows=batch_rows, seed=seed)


def rows_of_steps(start: int, stop: int, *, num_rows: int, batch_rows: int, seed: int) -> list[int]:
    """Rows of the steps from `start` up to `stop`, in order; one that several epochs show comes as often."""
    steps_per_epoch = num_steps_per_epoch(num_rows, batch_rows)
    rows: list[int] = []
    for epoch in range(start // steps_per_epoch, -(-stop // steps_per_epoch)):
        first = max(start - epoch * steps_per_epoch, 0)
        last = min(stop - epoch * steps_per_epoch, steps_per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        rows += order[first * batch_rows : last * batch_rows].tolist()
    return rows


def shard(indices: Sequence[T], rank: int, world_size: int) -> list[T]:
    """A rank's contiguous part; parts differ by at most one row and may be empty."""
    num_rows = len(indices)
    return list(indices[rank * num_rows // world_size : (rank + 1) * num_rows // world_size])


def cut_microbatches(
    indices: Sequence[int], num_tokens: Callable[[int], int], microbatch_tokens: int
) -> list[list[int]]:
    """Cut rows into micro-batches of similar length, longest first.

    Args:
        num_tokens: tokens of a row before padding.
        microbatch_tokens: limit of rows x longest row; a row longer than that is a micro-batch by itself.
    """
    ordered = sorted(indices, key=num_tokens, reverse=True)
    microbatches = []
    start = 0
    while start < len(ordered):
        count = max(1, microbatch_tokens // max(1, num_tokens(ordered[start])))
        microbatches.append(ordered[start : start + count])
        start += count
    return microbatches


def cut_packs(indices: Sequence[int], num_tokens: Callable[[int], int], microbatch_tokens: int) -> list[list[int]]:
    """Cut rows, in order, into micro-batches of rows that are packed without padding.

    Args:
        num_tokens: tokens of a row.
        microbatch_tokens: limit of the sum over a micro-batch; a row longer than that is one by itself.
    """
    packs: list[list[int]] = []
    room = 0
    for index in indices:
        size = num_tokens(index)
        if not packs or size > room:
            packs.append([])
            room = microbatch_tokens
        packs[-1].append(index)
        room -= size
    return packs
