"""Tokenized rows -> padded tensors. Masks come from lengths, never from the pad id (pad may be EOS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from prlhf.data.context import Context, ContextBatch, collate_contexts
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
        num_unscored: leading positions without a label in any row; a number, so that skipping them needs no device.
        context: what an encoder reads about the users of the B rows; None for other user models.
    """

    input_ids: Tensor
    labels: Tensor
    user_ids: Tensor
    rows: Tensor
    num_unscored: int
    context: ContextBatch | None = field(default=None, kw_only=True)

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
class ResponseBatch(_PaddedRows):
    """B demonstrations, one sequence each."""


@dataclass(frozen=True)
class PairBatch(_PaddedRows):
    """B preference rows as 2B sequences: 0..B-1 prompt + chosen, B..2B-1 prompt + rejected."""


def collate_pairs(
    rows: Sequence[TokenizedPair], pad_id: int, contexts: Sequence[Context] | None = None
) -> PairBatch:
    """Batch of at least one preference row, with a context for each or none at all."""
    chosen = [(row.prompt_ids, row.chosen_ids) for row in rows]
    rejected = [(row.prompt_ids, row.rejected_ids) for row in rows]
    input_ids, labels = _pad(chosen + rejected, pad_id)
    return PairBatch(
        input_ids=input_ids,
        labels=labels,
        user_ids=_int64([row.user_id for row in rows]),
        rows=_int64([row.row for row in rows]),
        num_unscored=min(len(row.prompt_ids) for row in rows),
        context=None if contexts is None else collate_contexts(contexts, pad_id),
    )


def collate_responses(
    rows: Sequence[TokenizedResponse], pad_id: int, contexts: Sequence[Context] | None = None
) -> ResponseBatch:
    """Batch of at least one response row, with a context for each or none at all."""
    input_ids, labels = _pad([(row.prompt_ids, row.response_ids) for row in rows], pad_id)
    return ResponseBatch(
        input_ids=input_ids,
        labels=labels,
        user_ids=_int64([row.user_id for row in rows]),
        rows=_int64([row.row for row in rows]),
        num_unscored=min(len(row.prompt_ids) for row in rows),
        context=None if contexts is None else collate_contexts(contexts, pad_id),
    )


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
