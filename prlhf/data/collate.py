"""Tokenized rows -> padded tensors. Masks come from lengths, never from the pad id (pad may be EOS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from prlhf.data.context import Context, ContextBatch, collate_contexts
from prlhf.data.tokenize import TokenizedLabelled, TokenizedPair, TokenizedResponse

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
        prompt_keys: (B,) equal numbers for equal prompts.
        response_keys: (N,) equal numbers for equal responses.
        context: what an encoder reads about the users of the B rows; None for other user models.
        is_idle: another rank's rows, read along because ranks gather sharded weights together; they count for nothing.
    """

    input_ids: Tensor
    labels: Tensor
    user_ids: Tensor
    rows: Tensor
    sequence_rows: tuple[int, ...]
    lengths: tuple[tuple[int, int], ...]
    prompt_keys: tuple[int, ...]
    response_keys: tuple[int, ...]
    context: ContextBatch | None = field(default=None, kw_only=True)
    is_idle: bool = field(default=False, kw_only=True)

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
            context=None if self.context is None else self.context.to(device),
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


@dataclass(frozen=True)
class LabelledBatch(_PaddedRows):
    """B unpaired rows as 2B sequences: 0..B-1 prompt + response, B..2B-1 prompt + mismatched response.

    Args:
        liked: (B,) bool.
    """

    liked: Tensor = field(kw_only=True)

    @property
    def responses(self) -> ResponseBatch:
        """The rows with their own responses."""
        return self._half(slice(0, self.num_rows))

    @property
    def mismatched(self) -> ResponseBatch:
        """The rows with responses to other prompts."""
        return self._half(slice(self.num_rows, None))

    def to(self, device: torch.device | str) -> LabelledBatch:
        """The batch on another device."""
        return replace(super().to(device), liked=self.liked.to(device))

    def _half(self, part: slice) -> ResponseBatch:
        return ResponseBatch(
            input_ids=self.input_ids[part],
            labels=self.labels[part],
            user_ids=self.user_ids,
            rows=self.rows,
            sequence_rows=self.sequence_rows[part],
            lengths=self.lengths[part],
            prompt_keys=self.prompt_keys,
            response_keys=self.response_keys[part],
            context=self.context,
        )


def collate_labelled(
    rows: Sequence[TokenizedLabelled], pad_id: int, contexts: Sequence[Context] | None = None
) -> LabelledBatch:
    """Batch of at least one unpaired row, with a context for each or none at all."""
    own = [(row.prompt_ids, row.response_ids) for row in rows]
    mismatched = [(row.prompt_ids, row.mismatched_ids) for row in rows]
    liked = torch.tensor([row.label for row in rows])
    sequence_rows = (*range(len(rows)), *range(len(rows)))
    return _collate(LabelledBatch, rows, own + mismatched, sequence_rows, pad_id, contexts, liked=liked)


def collate_pairs(
    rows: Sequence[TokenizedPair], pad_id: int, contexts: Sequence[Context] | None = None
) -> PairBatch:
    """Batch of at least one preference row, with a context for each or none at all."""
    chosen = [(row.prompt_ids, row.chosen_ids) for row in rows]
    rejected = [(row.prompt_ids, row.rejected_ids) for row in rows]
    sequence_rows = (*range(len(rows)), *range(len(rows)))
    return _collate(PairBatch, rows, chosen + rejected, sequence_rows, pad_id, contexts)


def collate_responses(
    rows: Sequence[TokenizedResponse], pad_id: int, contexts: Sequence[Context] | None = None
) -> ResponseBatch:
    """Batch of at least one response row, with a context for each or none at all."""
    sequences = [(row.prompt_ids, row.response_ids) for row in rows]
    return _collate(ResponseBatch, rows, sequences, tuple(range(len(rows))), pad_id, contexts)


def collate_trees(
    trees: Sequence[ResponseTree], pad_id: int, contexts: Sequence[Context] | None = None
) -> ResponseBatch:
    """Batch of at least one tree: B trees, as many sequences as they have responses, in order; contexts as above."""
    sequences = [(tree.prompt_ids, response_ids) for tree in trees for response_ids in tree.responses]
    sequence_rows = tuple(row for row, tree in enumerate(trees) for _ in tree.responses)
    return _collate(ResponseBatch, trees, sequences, sequence_rows, pad_id, contexts)


def _collate(
    kind: type[Rows],
    rows: Sequence[TokenizedPair | TokenizedLabelled | TokenizedResponse | ResponseTree],
    sequences: list[tuple[tuple[int, ...], tuple[int, ...]]],
    sequence_rows: tuple[int, ...],
    pad_id: int,
    contexts: Sequence[Context] | None,
    **further: Any,
) -> Rows:
    input_ids, labels = _pad(sequences, pad_id)
    return kind(
        input_ids=input_ids,
        labels=labels,
        user_ids=_int64([row.user_id for row in rows]),
        rows=_int64([row.row for row in rows]),
        sequence_rows=sequence_rows,
        lengths=tuple((len(prompt_ids), len(response_ids)) for prompt_ids, response_ids in sequences),
        prompt_keys=_number([row.prompt_ids for row in rows]),
        response_keys=_number([response_ids for _, response_ids in sequences]),
        context=None if contexts is None else collate_contexts(contexts, pad_id),
        **further,
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
