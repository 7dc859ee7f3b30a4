"""Tokenized rows -> padded tensors. Masks come from lengths, never from the pad id (pad may be EOS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from prlhf.data.tokenize import TokenizedPair, TokenizedResponse

IGNORE_INDEX = -100
Rows = TypeVar("Rows", bound="_PaddedRows")


@dataclass(frozen=True)
class _PaddedRows:
    """N sequences of prompt + response, padded on the right, for B rows of a data set.

    Args:
        input_ids: (N, L) int64.
        labels: (N, L) int64, input_ids on the response (EOS included), IGNORE_INDEX elsewhere.
        user_ids: (B,) int64, 0 is generic.
        rows: (B,) int64, position of each row in its data set.
        sequence_rows: (N,) the row among the B of each sequence. These and the following are plain numbers, so that
            laying out a batch never waits for the device.
        lengths: (N,) tokens of prompt and response.
        prompts: (B,) equal numbers for equal prompts.
        responses: (N,) equal numbers for equal responses.
    """

    input_ids: Tensor
    labels: Tensor
    user_ids: Tensor
    rows: Tensor
    sequence_rows: tuple[int, ...]
    lengths: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    responses: tuple[int, ...]

    @property
    def num_unscored(self) -> int:
        """Leading positions without a label in any row."""
        return min(prompt for prompt, _ in self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, pads not counted."""
        return sum(map(sum, self.lengths))

    def sequence_row_ids(self) -> Tensor:
        """`sequence_rows` as (N,) int64 on the batch's device."""
        return _int64(self.sequence_rows).to(self.input_ids.device, non_blocking=True)

    @property
    def num_rows(self) -> int:
        """B."""
        return self.rows.shape[0]

    def to(self: Rows, device: torch.device | str) -> Rows:
        """The batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            user_ids=self.user_ids.to(device),
            rows=self.rows.to(device),
        )


@dataclass(frozen=True)
class ResponseTree:
    """A prompt and responses to it, for one user; `row` numbers the trees."""

    row: int
    user_id: int
    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of all responses."""
        return len(self.prompt_ids) + sum(map(len, self.responses))


@dataclass(frozen=True)
class ResponseBatch(_PaddedRows):
    """B prompts with one or more responses each."""


@dataclass(frozen=True)
class PairBatch(_PaddedRows):
    """B preference rows as 2B sequences: 0..B-1 prompt + chosen, B..2B-1 prompt + rejected."""


def collate_pairs(rows: Sequence[TokenizedPair], pad_id: int) -> PairBatch:
    """Batch of at least one preference row."""
    chosen = [(row.prompt_ids, row.chosen_ids) for row in rows]
    rejected = [(row.prompt_ids, row.rejected_ids) for row in rows]
    return _collate(PairBatch, rows, chosen + rejected, (*range(len(rows)), *range(len(rows))), pad_id)


def collate_responses(rows: Sequence[TokenizedResponse], pad_id: int) -> ResponseBatch:
    """Batch of at least one response row."""
    sequences = [(row.prompt_ids, row.response_ids) for row in rows]
    return _collate(ResponseBatch, rows, sequences, tuple(range(len(rows))), pad_id)


def collate_trees(trees: Sequence[ResponseTree], pad_id: int) -> ResponseBatch:
    """Batch of at least one tree: B trees, as many sequences as they have responses, in order."""
    sequences = [(tree.prompt_ids, response_ids) for tree in trees for response_ids in tree.responses]
    sequence_rows = tuple(row for row, tree in enumerate(trees) for _ in tree.responses)
    return _collate(ResponseBatch, trees, sequences, sequence_rows, pad_id)


def _collate(
    kind: type[Rows],
    rows: Sequence[TokenizedPair] | Sequence[TokenizedResponse] | Sequence[ResponseTree],
    sequences: list[tuple[tuple[int, ...], tuple[int, ...]]],
    sequence_rows: tuple[int, ...],
    pad_id: int,
) -> Rows:
    input_ids, labels = _pad(sequences, pad_id)
    return kind(
        input_ids=input_ids,
        labels=labels,
        user_ids=_int64([row.user_id for row in rows]),
        rows=_int64([row.row for row in rows]),
        sequence_rows=sequence_rows,
        lengths=tuple((len(prompt_ids), len(response_ids)) for prompt_ids, response_ids in sequences),
        prompts=_number([row.prompt_ids for row in rows]),
        responses=_number([response_ids for _, response_ids in sequences]),
    )


def _number(values: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Each value's place among the distinct ones."""
    known: dict[tuple[int, ...], int] = {}
    return tuple(known.setdefault(value, len(known)) for value in values)


def _pad(sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], pad_id: int) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt_ids) + len(response_ids) for prompt_ids, response_ids in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    labels = torch.full((len(sequences), longest), IGNORE_INDEX, dtype=torch.int64)
    for position, (prompt_ids, response_ids) in enumerate(sequences):
        start, end = len(prompt_ids), len(prompt_ids) + len(response_ids)
        input_ids[position, :end] = _int64(prompt_ids + response_ids)
        labels[position, start:end] = _int64(response_ids)
    return input_ids, labels


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
