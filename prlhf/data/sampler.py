"""Which rows a step trains on: a pure function of (seed, step), the same for every world size and after a resume."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Sampler:
    """Cuts epochs, each a permutation of its own, into optimizer steps.

    Rows of one group stay side by side, in an order drawn anew as well: what they share is then computed once a step.

    Args:
        groups: a key of each row; rows of equal keys form a group.
        batch_rows: rows of a step over all ranks; only an epoch's last step may have fewer.
    """

    def __init__(self, groups: Sequence[Hashable], *, batch_rows: int, seed: int) -> None:
        numbers: dict[Hashable, int] = {}
        self._groups = np.array([numbers.setdefault(key, len(numbers)) for key in groups], dtype=np.int64)
        self._num_groups = len(numbers)
        self._batch_rows = batch_rows
        self._seed = seed
        self._order: tuple[int, np.ndarray] = (-1, self._groups)  # epoch and its permutation

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._groups)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that show every row once."""
        return -(-self.num_rows // self._batch_rows)

    def rows_of_step(self, step: int) -> list[int]:
        """Rows of one optimizer step, over all ranks.

        Args:
            step: 0-based, over all epochs.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self._batch_rows
        rows: list[int] = self._order_of(epoch)[first : first + self._batch_rows].tolist()
        return rows

    def rows_of_first_steps(self, num_steps: int) -> set[int]:
        """Rows that the steps before `num_steps` show."""
        if num_steps >= self.steps_per_epoch:
            return set(range(self.num_rows))
        return set(self._order_of(0)[: num_steps * self._batch_rows].tolist())

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            draw = np.random.default_rng([self._seed, epoch])
            place_of_group = np.argsort(draw.permutation(self._num_groups))
            place_in_group = draw.permutation(self.num_rows)
            self._order = (epoch, np.lexsort((place_in_group, place_of_group[self._groups])))
        return self._order[1]


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


def cut_packs(
    indices: Sequence[int],
    num_tokens: Callable[[int], int],
    microbatch_tokens: int,
    group_of: Callable[[int], Hashable] = lambda index: index,
) -> list[list[int]]:
    """Cut rows into micro-batches of rows that are packed without padding: in order, but for the rows of a group.

    Args:
        num_tokens: tokens of a row.
        microbatch_tokens: limit of the sum over a micro-batch; a row longer than that is one by itself.
        group_of: rows of equal keys share work if they are in one micro-batch: they are put where the first of them is,
            and not cut apart where one micro-batch can hold them.
    """
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        groups.setdefault(group_of(index), []).append(index)
    packs: list[list[int]] = []
    room = 0
    for members in groups.values():
        if room < sum(map(num_tokens, members)) <= microbatch_tokens:
            room = 0
        for index in members:
            size = num_tokens(index)
            if not packs or size > room:
                packs.append([])
                room = microbatch_tokens
            packs[-1].append(index)
            room -= size
    return packs


def cut_rows(
    indices: Sequence[int],
    *,
    packs: Callable[[int], bool],
    num_packed: Callable[[int], int],
    num_padded: Callable[[int], int],
    microbatch_tokens: int,
    group_of: Callable[[int], Hashable] = lambda index: index,
) -> list[list[int]]:
    """Cut rows into packs, and those that cannot be packed, apart from them, into micro-batches of padded rows.

    Args:
        packs: whether a row can be packed; one that cannot would have all beside it padded to its length.
        num_packed: tokens of a row in a pack.
        num_padded: tokens of a row before padding.
        microbatch_tokens: limit of either kind, as for `cut_packs` and `cut_microbatches`.
        group_of: of packs, as for `cut_packs`.
    """
    packed, padded = ([index for index in indices if packs(index) is wanted] for wanted in (True, False))
    return [
        *cut_packs(packed, num_packed, microbatch_tokens, group_of),
        *cut_microbatches(padded, num_padded, microbatch_tokens),
    ]
