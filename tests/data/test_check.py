"""The report on data: masks, leaks, duplicates and the length-only baseline."""

from __future__ import annotations

from typing import Any

import pytest

from prlhf.data.check import length_only_accuracy, majority_share, make_report
from prlhf.data.records import PreferenceData, PreferenceRow


def row(prompt: str, user: str, chosen: str, rejected: str) -> PreferenceRow:
    return PreferenceRow(prompt, user, prompt, chosen, rejected)


LONG, SHORT = "a longer answer", "short"


def test_length_alone_is_right_for_users_with_opposite_tastes_in_length() -> None:
    train = [row("1", "long", LONG, SHORT), row("1", "brief", SHORT, LONG)]
    held_out = [row("2", "long", LONG, SHORT), row("2", "brief", SHORT, LONG)]
    assert length_only_accuracy(train, held_out) == 1.0
    assert length_only_accuracy(train, [row("2", "long", SHORT, LONG)]) == 0.0


def test_length_alone_takes_each_users_majority_and_half_of_equal_lengths() -> None:
    train = [row("1", "u", SHORT, LONG), row("2", "u", SHORT, LONG), row("3", "u", LONG, SHORT)]
    held_out = [row("4", "u", SHORT, LONG), row("5", "u", "same1", "same2"), row("6", "u", LONG, SHORT)]
    assert length_only_accuracy(train, held_out) == pytest.approx((1 + 0.5 + 0) / 3)
    assert length_only_accuracy(train, []) is None


def test_length_alone_gives_unseen_users_the_rule_of_most_training_rows() -> None:
    train = [row(str(n), "u", SHORT, LONG) for n in range(3)] + [row("9", "v", LONG, SHORT)]
    assert length_only_accuracy(train, [row("4", "new", SHORT, LONG)]) == 1.0


def test_one_preference_for_all_gets_the_share_of_the_more_frequent_taste_and_half_of_equal_lengths() -> None:
    longer, shorter, equal = row("1", "u", LONG, SHORT), row("2", "v", SHORT, LONG), row("3", "u", "same1", "same2")
    assert majority_share([*[longer] * 3, shorter]) == majority_share([*[shorter] * 3, longer]) == 0.75
    assert majority_share([longer, equal]) == 0.75
    assert majority_share([]) is None


def test_the_report_shows_prompt_masked_and_response_scored_as_the_batch_has_them(toy: Any) -> None:
    data = PreferenceData([row("Why?", "\u202eu", "Yes.", "No, never.")], [], [], [], "test")
    report = make_report(data, toy, max_tokens=100, max_prompt_tokens=50)
    assert "pair 'Why?', user '\\u202eu' = 1" in report
    assert "chosen: '<|begin|>Why?\\n' <<'Yes.<|im_end|>'>>" in report
    assert "rejected: '<|begin|>Why?\\n' <<'No, never.<|im_end|>'>>" in report
    assert "prompt   min 5  median 5  p95 5  max 5" in report


def test_the_report_counts_rows_that_tokenizing_drops_or_truncates(toy: Any) -> None:
    rows = [row("p", "u", "x" * 50, "y"), row("q", "u", "same", "same"), row("r", "u", "x", "y")]
    report = make_report(PreferenceData(rows, [], [], [], "test"), toy, max_tokens=30, max_prompt_tokens=20)
    assert "train: dropped equal_responses 1; truncated responses in 1 rows" in report


def test_the_report_counts_overlap_of_prompts_pairs_and_responses() -> None:
    train = [row("p1", "u", "a", "b"), row("p2", "u", "c", "d")]
    held_out = [row("p1", "u", "b", "a"), row("P1 ", "u", "x", "y"), row("p3", "u", "c", "z"), row("p4", "u", "m", "n")]
    report = make_report(PreferenceData(train, [], held_out, [], "test"))
    assert "eval_seen of 4: prompt 2 (50.0%), pair 1 (25.0%), response 2 (50.0%)  LEAK" in report
    assert "LEAK" not in make_report(PreferenceData(train, [], held_out[1:], [], "test"))


def test_the_report_counts_repeated_contradictory_and_disputed_judgments() -> None:
    train = [
        row("p", "u", "a", "b"), row("p", "u", "a", "b"), row("p", "u", "b", "a"), row("p", "v", "b", "a"),
        row("q", "u", "a", "b"), row("q", "v", "b", "a"), row("r", "u", "a", "b"),
    ]
    report = make_report(PreferenceData(train, [], [], [], "test"))
    assert "repeated rows 1; pairs judged both ways by one user 1; pairs with both verdicts 2 of 3" in report


def test_the_report_names_users_and_lists_at_most_twenty() -> None:
    train = [row(str(n), f"user{n}", "a", "bb") for n in range(25)]
    report = make_report(PreferenceData(train, [], [], [row("x", "new", "a", "bb")], "test"))
    assert "users: 25 seen, 1 unseen" in report and "'user19': train 1, eval_unseen 0" in report
    assert "user20" not in report and "and 5 more" in report
    assert "eval_unseen: 1.000" in report
