"""A KV cache whose rows come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


@dataclass
class _Columns:
    """Where the rows of every layer are.

    Args:
        lengths: cached tokens of each row; row i lies in slot i.
        end: the column behind the last token of every row.
        joining: (slot, place in the call, length) of the rows that the backbone is reading; None while it goes on
            with the rows that are there.
        heads: place of the head that each prompt of that call goes on from; None: the call holds whole prompts.
        reads_heads: what the backbone is reading are heads.
    """

    num_slots: int
    num_columns: int
    lengths: list[int] = field(default_factory=list)
    end: int = 0
    joining: list[tuple[int, int, int]] | None = None
    heads: list[int] | None = None
    reads_heads: bool = False

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)


class SlotCache(Cache):
    """Keys and values of rows that end in the same column, whatever their lengths; memory is taken once.

    Aligned so, the distance between two columns is that of the tokens in them, in every row: transformers' own masks
    hold, sliding windows included, and what stands left of a row is masked as any left padding.

    Args:
        num_slots: most rows at a time.
        num_columns: more than the longest row will ever have; what is beyond makes moves to the left rarer.
    """

    layers: list[Any]

    def __init__(self, num_slots: int, num_columns: int) -> None:
        super().__init__(layers=[])
        self._columns = _Columns(num_slots, num_columns)

    @property
    def lengths(self) -> list[int]:
        """Cached tokens of each row."""
        return self._columns.lengths

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, L, E) of a layer to attend to; called by the backbone."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_SlotLayer(self._columns))
        return self.layers[layer_idx].update(key_states, value_states)

    @contextmanager
    def reading_heads(self) -> Iterator[None]:
        """Inside, the backbone reads what many prompts begin with, all of one length; kept beside the rows and behind
        the heads that were read before.
        """
        self._columns.reads_heads = True
        yield
        self._columns.reads_heads = False

    @contextmanager
    def joining(
        self, sources: Sequence[int], lengths: Sequence[int], heads: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Inside, the backbone reads prompts that are padded on the right; they become the last rows.

        Args:
            sources: for each new row, its prompt's place in the call; several rows may have the same.
            lengths: of the rows, heads included, none above the longest row that is there, if one is.
            heads: for each prompt of the call, the place among the heads of what it goes on from; None: whole prompts.
        """
        columns = self._columns
        first = len(columns.lengths)
        if not columns.lengths:
            columns.end = max(lengths)
        assert max(lengths) <= columns.end and first + len(lengths) <= columns.num_slots
        columns.joining = [(first + i, *place) for i, place in enumerate(zip(sources, lengths, strict=True))]
        columns.heads = None if heads is None else list(heads)
        for layer in self.layers:
            layer.clear_joining_()
        yield
        columns.joining = None
        columns.lengths += lengths

    def grow_(self) -> None:
        """Every row has one token more, which the backbone has just read."""
        self._columns.lengths[:] = [length + 1 for length in self._columns.lengths]
        self._columns.end += 1

    def make_room_(self) -> None:
        """Move the rows to the left if they have reached the last column."""
        columns = self._columns
        if columns.end < columns.num_columns:
            return
        num_rows, width = len(columns.lengths), columns.width
        for tensor in self._tensors():
            tensor[:num_rows, :, :width] = tensor[:num_rows, :, columns.end - width : columns.end].clone()
        columns.end = width

    def keep_(self, rows: Sequence[int]) -> None:
        """Drop all rows but these; they stay in the order given."""
        columns = self._columns
        moves = [(slot, row) for slot, row in enumerate(rows) if slot != row]
        if moves:
            slots, origins = (list(numbers) for numbers in zip(*moves, strict=True))
            span = slice(columns.end - columns.width, columns.end)
            for tensor in self._tensors():
                tensor[slots, :, span] = tensor[origins, :, span]
        columns.lengths[:] = [columns.lengths[row] for row in rows]

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield from (layer.keys, layer.values)


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer, (slots, H, columns, E)."""

    keys: Any
    values: Any
    heads: Any = None  # keys and values (heads, H, length, E), once some were read

    def __init__(self, columns: _Columns) -> None:
        super().__init__()
        self.columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, of the size and type of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_empty(self.columns.num_slots, x.shape[1], self.columns.num_columns, x.shape[3])
            for x in (key_states, value_states)
        )
        self.is_initialized = True
        self.clear_joining_()

    def clear_joining_(self) -> None:
        """Zeros left of the rows that join, for a masked NaN is still a NaN; elsewhere nothing is read before it is
        written.
        """
        for slot, _, length in self.columns.joining or ():
            for cached in (self.keys, self.values):
                cached[slot, :, : self.columns.end - length] = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store what was read, and say what to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        columns = self.columns
        if columns.reads_heads:
            if self.heads is None:
                self.heads = key_states, value_states
            else:
                self.heads = torch.cat([self.heads[0], key_states]), torch.cat([self.heads[1], value_states])
            return key_states, value_states
        if columns.joining is not None and columns.heads is not None:
            head_keys, head_values = (head[columns.heads] for head in self.heads)
            key_states = torch.cat([head_keys, key_states], dim=2)
            value_states = torch.cat([head_values, value_states], dim=2)
        both = ((self.keys, key_states), (self.values, value_states))
        if columns.joining is not None:
            for slot, source, length in columns.joining:
                for cached, states in both:
                    cached[slot, :, columns.end - length : columns.end] = states[source, :, :length]
            return key_states, value_states
        num_rows, end = len(columns.lengths), columns.end
        for cached, states in both:
            cached[:num_rows, :, end] = states[:, :, 0]
        begin = end - columns.width
        return self.keys[:num_rows, :, begin : end + 1], self.values[:num_rows, :, begin : end + 1]

    def get_seq_length(self) -> int:
        """Cached tokens, as the backbone counts them for its masks."""
        columns = self.columns
        if columns.reads_heads or (columns.joining is not None and columns.heads is None):
            return 0
        return columns.width if columns.joining is None else self.heads[0].shape[2]
