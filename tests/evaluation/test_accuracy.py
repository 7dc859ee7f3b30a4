"""Accuracy from margins, its interval, and the margins themselves."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prlhf.data.collate import collate_responses
from prlhf.data.records import PreferenceRow
from prlhf.data.tokenize import TokenizedPair, TokenizedResponse
from prlhf.data.user_index import GENERIC_USER_ID
from prlhf.evaluation import scoring
from prlhf.evaluation.accuracy import (
    PairMargins,
    bootstrap_interval,
    draw_rows,
    has_length_gap,
    score_pairs,
    summarize_accuracy,
    user_accuracies,
)
from prlhf.models.policy import Reference
from tests.policies import make_row, make_rows, plain_logps, randomize_, tiny_policy
from tests.run_distributed import run_distributed_test

OPTIONS = {"pad_id": 2, "microbatch_tokens": 10_000}


def _row(pair_id: str, user_id: str = "ann", chosen: str = "yes", rejected: str = "no") -> PreferenceRow:
    return PreferenceRow(pair_id, user_id, "?", chosen, rejected)


def test_accuracy_counts_positive_margins_by_row_and_by_user():
    """ann: 3 of 4 right, bob: 0 of 1 (a tie is wrong); 3 of 5 rows, mean of users 0.375."""
    rows = [_row(str(i), user) for i, user in enumerate(["ann", "bob", "ann", "ann", "ann"])]
    margins = np.array([0.1, 0.0, -3.0, 2.0, 1e-9])
    assert user_accuracies(margins, rows) == {"ann": 0.75, "bob": 0.0}
    summary = summarize_accuracy(margins, rows, seed=1)
    low, high = summary.pop("ci95")
    assert low < 0.6 < high
    assert summary == {"mean": 0.6, "user_mean": 0.375, "worst_user": 0.0, "num_rows": 5, "num_users": 2}


def test_no_rows_have_no_accuracy():
    assert summarize_accuracy(np.zeros(0), [], seed=1) is None


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_interval_of_independent_rows_is_the_binomial_one(share):
    """mean +- 1.96 sqrt(p (1 - p) / n); 1,000 resamples find each end within a tenth of the half-width."""
    num_rows = 1000
    values = (np.arange(num_rows) < share * num_rows).astype(np.float64)
    low, high = bootstrap_interval(values, [str(i) for i in range(num_rows)], seed=0)
    half_width = 1.96 * math.sqrt(share * (1 - share) / num_rows)
    assert low == pytest.approx(share - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(share + half_width, abs=0.1 * half_width)


def test_rows_that_agree_within_their_pair_widen_the_interval():
    """Four equal rows a pair are one observation: the interval is that of a quarter of the rows, twice as wide."""
    values = np.repeat([0.0, 1.0], 100).repeat(4)
    pairs = [str(i) for i in range(200) for _ in range(4)]
    low, high = bootstrap_interval(values, pairs, seed=0)
    expected = 2 * 1.96 * math.sqrt(0.25 / 200)
    assert high - low == pytest.approx(expected, rel=0.1)
    narrow = bootstrap_interval(values, [str(i) for i in range(800)], seed=0)
    assert high - low == pytest.approx(2 * (narrow[1] - narrow[0]), rel=0.15)


def test_pairs_of_different_sizes_weigh_by_their_rows():
    """A hundred pairs of nine right rows and a hundred of one wrong row: 0.9, where a mean of pairs would be 0.5."""
    values = np.array([1.0] * 900 + [0.0] * 100)
    groups = [f"right {i // 9}" for i in range(900)] + [f"wrong {i}" for i in range(100)]
    low, high = bootstrap_interval(values, groups, seed=0)
    assert 0.85 < low < 0.9 < high < 0.95


def test_the_interval_depends_on_its_seed_alone():
    values, groups = np.sqrt(np.arange(50)), [str(i // 2) for i in range(50)]
    first = bootstrap_interval(values, groups, seed=1)
    assert bootstrap_interval(values, groups, seed=1) == first
    assert bootstrap_interval(values, groups, seed=2) != first


@pytest.mark.parametrize(("lengths", "expected"), [((80, 100), True), ((81, 100), False), ((5, 5), False)])
def test_the_length_gap_is_a_fifth_of_the_longer_response_either_way_round(lengths, expected):
    short, long = ("x" * length for length in lengths)
    assert has_length_gap(_row("p", chosen=short, rejected=long)) is expected
    assert has_length_gap(_row("p", chosen=long, rejected=short)) is expected


def _records(tokenized: list[TokenizedPair]) -> list[PreferenceRow]:
    return [_row(str(row.row), f"u{row.user_id}") for row in tokenized]


def _plain_margin(model, prompt_ids, row: TokenizedPair) -> float:
    chosen, rejected = (plain_logps(model, prompt_ids, ids).sum().item() for ids in (row.chosen_ids, row.rejected_ids))
    return chosen - rejected


def test_margins_are_policy_minus_reference_for_the_users_and_for_the_generic_one():
    policy = tiny_policy()
    policy.reference = Reference(policy, frozen_copy=True)
    randomize_(policy.backbone, scale=0.05)
    tokens = torch.tensor([[9, 40, 5], [17, 60, 33], [12, 8, 77]])  # soft prompts of users 0, 1, 2 as tokens
    with torch.no_grad():
        embeds = policy.input_embeds(tokens, None)
        policy.user_encoder.generic.copy_(embeds[0])
        policy.user_encoder.offsets.copy_(embeds[1:] - embeds[0])
    rows = make_rows(policy)
    margins = score_pairs(policy, _records(rows), rows, **OPTIONS)
    with policy.reference.active() as frozen:
        reference = [_plain_margin(frozen.backbone, row.prompt_ids, row) for row in rows]

    def expected(user_of) -> list[float]:
        prompts = [(0, *tokens[user_of(row)].tolist(), *row.prompt_ids[1:]) for row in rows]
        policies = [_plain_margin(policy.backbone, *item) for item in zip(prompts, rows, strict=True)]
        return [ours - theirs for ours, theirs in zip(policies, reference, strict=True)]

    # Up to 57 tokens a pair at 1e-5 nats each.
    np.testing.assert_allclose(margins.reference, reference, atol=6e-4)
    np.testing.assert_allclose(margins.individual, expected(lambda row: row.user_id), atol=1e-3)
    np.testing.assert_allclose(margins.generic, expected(lambda row: GENERIC_USER_ID), atol=1e-3)
    assert [row.pair_id for row in margins.rows] == ["0", "1", "2", "3"]
    assert not np.allclose(margins.individual, margins.generic, atol=1e-2)


def test_dropped_rows_keep_the_others_with_their_records():
    policy = tiny_policy()
    rows = make_rows(policy)
    margins = score_pairs(policy, _records(rows), rows[2:], **OPTIONS)
    assert [row.pair_id for row in margins.rows] == ["2", "3"] and margins.individual.shape == (2,)


def test_swapping_chosen_and_rejected_turns_every_margin_around():
    policy = tiny_policy(lora=True)
    randomize_(policy, scale=0.1)
    rows = make_rows(policy)
    swapped = [replace(row, chosen_ids=row.rejected_ids, rejected_ids=row.chosen_ids) for row in rows]
    first, second = (score_pairs(policy, _records(rows), pairs, **OPTIONS) for pairs in (rows, swapped))
    for name in ("individual", "generic", "reference"):
        np.testing.assert_allclose(getattr(first, name), -getattr(second, name), atol=1e-4)


def test_a_policy_without_users_repeats_its_one_margin():
    policy = tiny_policy(num_users=0, lora=True)
    randomize_(policy, scale=0.1)
    rows = make_rows(policy)
    margins = score_pairs(policy, _records(rows), rows, **OPTIONS)
    np.testing.assert_array_equal(margins.individual, margins.generic)
    assert np.abs(margins.individual).min() > 1e-3


def test_unseen_users_are_scored_once_as_the_generic_one(monkeypatch: pytest.MonkeyPatch):
    scored = _count_scored(monkeypatch)
    policy = tiny_policy()
    rows = [replace(row, user_id=GENERIC_USER_ID) for row in make_rows(policy)]
    margins = score_pairs(policy, _records(rows), rows, **OPTIONS)
    np.testing.assert_array_equal(margins.individual, margins.generic)
    assert scored == [8, 8]


def test_each_distinct_sequence_is_scored_once_a_user(monkeypatch: pytest.MonkeyPatch):
    """Three users judge one pair, two of them opposed: 2 sequences for the reference, 2 generic, 2 a user."""
    scored = _count_scored(monkeypatch)
    policy = tiny_policy(num_users=3)
    row = make_row(policy, 0, user_id=1, lengths=(4, 6, 3))
    swapped = replace(row, user_id=2, chosen_ids=row.rejected_ids, rejected_ids=row.chosen_ids)
    rows = [row, swapped, replace(row, user_id=3), row]
    score_pairs(policy, [_row("p")], rows, **OPTIONS)
    assert scored == [2, 2, 6]


def _count_scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of sequences that `score_sequences` is given from now on, call by call."""
    counts: list[int] = []
    score = scoring.score_sequences

    def counting(policy, sequences, *args, **kwargs):
        counts.append(len(sequences))
        return score(policy, sequences, *args, **kwargs)

    monkeypatch.setattr(scoring, "score_sequences", counting)
    return counts


def _write_margins(folder: Path) -> None:
    margins = _margins_of_tiny_policy()
    np.save(folder / f"{scoring.rank()}.npy", np.stack([margins.individual, margins.generic, margins.reference]))


def _margins_of_tiny_policy() -> PairMargins:
    torch.set_num_threads(1)
    policy = tiny_policy(lora=True)
    randomize_(policy, scale=0.1)
    rows = make_rows(policy)
    return score_pairs(policy, _records(rows), rows, **OPTIONS)


@pytest.mark.slow
def test_two_ranks_share_the_work_and_agree_with_one(tmp_path):
    run_distributed_test(_write_margins, 2, tmp_path)
    alone = _margins_of_tiny_policy()
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in (0, 1))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, np.stack([alone.individual, alone.generic, alone.reference]), atol=1e-4)


def test_margins_without_reference_are_of_mean_log_probs():
    policy = tiny_policy()
    tokenized = make_rows(policy)
    rows = [_row(str(i)) for i in range(len(tokenized))]
    margins = score_pairs(policy, rows, tokenized, reference_free=True, with_reference=False, **OPTIONS)
    assert margins.reference is None
    for i, row in enumerate(tokenized):
        user_ids = torch.tensor([row.user_id])
        expected = []
        for ids in row.responses:
            batch = collate_responses([TokenizedResponse(0, row.user_id, row.prompt_ids, ids)], 2)
            expected.append(policy.sequence_logps(batch, user_ids)[0].item() / len(ids))
        assert margins.individual[i] == pytest.approx(expected[0] - expected[1], abs=1e-5)


def test_a_draw_of_rows_is_of_as_many_users_as_can_be_and_in_their_order() -> None:
    rows = [PreferenceRow(f"{user}{i}", user, "Q", "a", "b") for user in ("ann", "bob", "cat") for i in range(8)]
    for seed in range(5):
        drawn = draw_rows(rows, 4, seed=seed)
        assert sorted(Counter(row.user_id for row in drawn).values()) == [1, 1, 2]
        assert drawn == sorted(drawn, key=rows.index) and drawn == draw_rows(rows, 4, seed=seed)
    assert len({tuple(row.pair_id for row in draw_rows(rows, 4, seed=seed)) for seed in range(5)}) > 1
    assert draw_rows(rows, None, seed=0) == draw_rows(rows, 24, seed=0) == draw_rows(rows, 99, seed=0) == rows
