"""Padding and masks."""

from __future__ import annotations

import torch

from prlhf.data.collate import IGNORE_INDEX, collate_pairs, collate_responses
from prlhf.data.tokenize import TokenizedPair, TokenizedResponse

X = IGNORE_INDEX


def test_pairs_become_chosen_rows_then_rejected_rows_padded_on_the_right() -> None:
    rows = [TokenizedPair(7, 2, (1, 5), (6, 9), (7, 8, 9)), TokenizedPair(3, 0, (1,), (4,), (9,))]
    batch = collate_pairs(rows, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 5, 6, 9, 0], [1, 4, 0, 0, 0], [1, 5, 7, 8, 9], [1, 9, 0, 0, 0]]
    assert batch.labels.tolist() == [[X, X, 6, 9, X], [X, 4, X, X, X], [X, X, 7, 8, 9], [X, 9, X, X, X]]
    assert batch.user_ids.tolist() == [2, 0] and batch.rows.tolist() == [7, 3] and batch.num_rows == 2
    assert {tensor.dtype for tensor in (batch.input_ids, batch.labels, batch.user_ids, batch.rows)} == {torch.int64}


def test_the_mask_comes_from_lengths_so_a_pad_that_is_eos_masks_no_eos() -> None:
    eos = 9
    rows = [TokenizedResponse(0, 0, (eos, 5), (6, eos)), TokenizedResponse(1, 0, (), (eos,))]
    batch = collate_responses(rows, pad_id=eos)
    assert batch.input_ids.tolist() == [[9, 5, 6, 9], [9, 9, 9, 9]]
    assert batch.labels.tolist() == [[X, X, 6, 9], [9, X, X, X]]
    assert batch.num_rows == 2


def test_a_batch_moves_to_a_device_with_everything_it_holds() -> None:
    pairs = collate_pairs([TokenizedPair(0, 1, (1,), (2,), (3,))], pad_id=0).to("meta")
    responses = collate_responses([TokenizedResponse(0, 1, (1,), (2,))], pad_id=0).to("meta")
    for batch in (pairs, responses):
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert [tensor.device.type for tensor in tensors] == ["meta"] * 4


def test_the_leading_positions_that_no_row_scores_are_counted() -> None:
    rows = [TokenizedPair(0, 1, (1, 5, 6), (2,), (3,)), TokenizedPair(1, 1, (1, 5), (2,), (3, 4, 5))]
    for batch in (collate_pairs(rows, pad_id=0), collate_responses([TokenizedResponse(0, 0, (1, 5), (2,))], pad_id=0)):
        scored = (batch.labels != IGNORE_INDEX).any(dim=0)
        assert batch.num_unscored == 2 and scored.tolist().index(True) == 2
