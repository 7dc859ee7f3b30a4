"""The shuffled-user control, and what it is expected to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from prlhf.data.check import count_overlap
from prlhf.data.context import Context, UserContexts, collect_facts
from prlhf.data.records import PreferenceRow
from prlhf.data.render import encode_text
from prlhf.data.tokenize import TokenizedPair
from prlhf.evaluation import leaks
from prlhf.evaluation.accuracy import PairMargins
from prlhf.evaluation.leaks import expected_when_shuffled, shuffled_users
from tests.tokenizers import tiny_tokenizer

SHORT, LONG = "short", "a longer one"


def opposed(num_rows: int, minority: float, *, shared: bool) -> list[PreferenceRow]:
    """Ann likes long responses, and Bob, who has a share of the rows, short ones; all rows are one pair, or none."""
    rows = []
    for number in range(num_rows):
        user = "bob" if number < minority * num_rows else "ann"
        suffix = "" if shared else f" {number}"
        chosen, rejected = (SHORT, LONG) if user == "bob" else (LONG, SHORT)
        rows.append(PreferenceRow(str(number), user, f"p{suffix}", chosen + suffix, rejected + suffix))
    return rows


@pytest.mark.parametrize("shared", [True, False], ids=["pairs judged by both", "tastes of length"])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_two_opposed_tastes_are_expected_at_p2_plus_1_minus_p_2(share: float, shared: bool) -> None:
    rows = opposed(100, share, shared=shared)
    expected = expected_when_shuffled(rows, rows)
    assert expected == {"mean": pytest.approx(share**2 + (1 - share) ** 2), "known": pytest.approx(1.0)}


def test_users_of_whom_nothing_is_known_agree_half_of_the_time() -> None:
    """Three users with a third of the rows each: 1/3 is themselves, two share opposed pairs, the third shares none."""
    rows = [
        PreferenceRow("1", "ann", "p", "aa", "bb"),
        PreferenceRow("1", "bob", "p", "bb", "aa"),
        PreferenceRow("2", "cat", "q", "cc", "dd"),
    ]
    expected = expected_when_shuffled([], rows)
    assert expected == {"mean": pytest.approx(1 / 3 + 4 / 9 * 0.5), "known": pytest.approx(1 / 3 + 2 / 9)}
    assert expected_when_shuffled(rows, []) is None


def test_a_perfect_model_scores_what_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 draws of the two tastes: 0.3^2 + 0.7^2 = 0.58, to three standard errors of 0.011."""
    rows = opposed(100, 0.3, shared=False)
    users = {"ann": 1, "bob": 2}
    tokenized = [TokenizedPair(i, users[row.user_id], (1,), (2,), (3,)) for i, row in enumerate(rows)]

    def score(_: Any, rows: list[PreferenceRow], shuffled: list[TokenizedPair], **__: Any) -> PairMargins:
        right = [1.0 if users[rows[ids.row].user_id] == ids.user_id else -1.0 for ids in shuffled]
        return PairMargins([], np.array(right), np.array(right), None)

    monkeypatch.setattr(leaks, "score_pairs", score)
    figures = shuffled_users(None, rows, tokenized, seed=3)  # type: ignore[arg-type]
    assert figures is not None and (figures["num_rows"], figures["num_draws"]) == (100, 20)
    assert figures["mean"] == pytest.approx(0.58, abs=0.033)
    assert shuffled_users(None, [], [], seed=3) is None  # type: ignore[arg-type]


def test_with_many_users_a_part_of_the_rows_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(row, user_id=str(i)) for i, row in enumerate(opposed(200, 0.5, shared=False))]
    tokenized = [TokenizedPair(i, i + 1, (1,), (2,), (3,)) for i in range(200)]
    seen: list[TokenizedPair] = []

    def score(_: Any, __: Any, shuffled: list[TokenizedPair], **___: Any) -> PairMargins:
        seen.extend(shuffled)
        return PairMargins([], np.ones(len(shuffled)), np.ones(len(shuffled)), None)

    monkeypatch.setattr(leaks, "score_pairs", score)
    figures = shuffled_users(None, rows, tokenized, seed=3)  # type: ignore[arg-type]
    assert figures == {"mean": 1.0, "num_rows": 60, "num_draws": 20}
    assert len(seen) == leaks.MAX_SCORED_ROWS


def test_all_who_judged_a_pair_are_scored_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that prefers one response whoever asks scores exactly one half on pairs of two opposed users."""
    pairs = [opposed(2, 0.5, shared=True) for _ in range(400)]
    rows = [replace(row, pair_id=str(i)) for i, pair in enumerate(pairs) for row in pair]
    tokenized = [TokenizedPair(i, i % 2 + 1, (1,), (2,), (3,)) for i in range(len(rows))]

    def score(_: Any, rows: list[PreferenceRow], shuffled: list[TokenizedPair], **__: Any) -> PairMargins:
        margins = np.array([1.0 if rows[ids.row].chosen == SHORT else -1.0 for ids in shuffled])
        return PairMargins([], margins, margins, None)

    monkeypatch.setattr(leaks, "score_pairs", score)
    figures = shuffled_users(None, rows, tokenized, seed=3)  # type: ignore[arg-type]
    assert figures == {"mean": 0.5, "num_rows": 600, "num_draws": 20}


@pytest.mark.parametrize("kind", ["text", "history"])
def test_an_encoder_reads_of_the_drawn_user_and_no_pair_about_the_rows_prompt(
    kind: Literal["text", "history"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A perfect reader is right where both users want the same: 0.58 of 2,000 draws, to three standard errors."""
    rows = [replace(row, user_text=f"I am {row.user_id}.") for row in opposed(100, 0.3, shared=False)]
    users = {"ann": 1, "bob": 2}
    tokenized = [TokenizedPair(i, users[row.user_id], (1,), (2,), (3,)) for i, row in enumerate(rows)]
    tokenizer = tiny_tokenizer()
    contexts = UserContexts(kind, tokenizer, max_tokens=50, max_pairs=99, facts=collect_facts(rows))
    contexts.facts["ann"] = replace(contexts.facts["ann"], text="I changed.")  # a row's own text counts

    every_text = [*(text for row in rows for text in (row.chosen, row.rejected)), "I am ann.", "I am bob."]
    text_of = {tuple(encode_text(tokenizer, text)): text for text in every_text}

    def score(_: Any, __: Any, shuffled: list[TokenizedPair], contexts: list[Context], **___: Any) -> PairMargins:
        right = []
        for ids, context in zip(shuffled, contexts, strict=True):
            drawn = next(user for user, index in users.items() if index == ids.user_id)
            texts = [text_of[text] for text in context]
            if kind == "text":
                assert texts == [f"I am {drawn}."]
            else:
                wanted = LONG if drawn == "ann" else SHORT
                own = {row.chosen for row in rows if row.user_id == drawn} - {rows[ids.row].chosen}
                assert set(texts[0::2]) == own and all(text.startswith(wanted) for text in own)
            right.append(1.0 if rows[ids.row].user_id == drawn else -1.0)
        return PairMargins([], np.array(right), np.array(right), None)

    monkeypatch.setattr(leaks, "score_pairs", score)
    figures = shuffled_users(None, rows, tokenized, contexts, seed=3)  # type: ignore[arg-type]
    assert figures is not None and (figures["num_rows"], figures["num_draws"]) == (100, 20)
    assert figures["mean"] == pytest.approx(0.58, abs=0.033)


def test_overlap_counts_prompts_pairs_and_responses() -> None:
    train = [PreferenceRow("1", "ann", "Prompt", "a", "b"), PreferenceRow("2", "ann", "q", "c", "d")]
    rows = [
        replace(train[0], user_id="bob", chosen="b", rejected="a"),
        PreferenceRow("3", "ann", "prompt ", "c", "new"),
        PreferenceRow("4", "ann", "r", "e", "f"),
    ]
    assert count_overlap(train, rows) == {"prompt": 2, "pair": 1, "response": 2}


def test_of_many_users_some_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 users, one of two opposed tastes each, who all judge two pairs."""
    rows = [row for number in range(20) for row in (
        PreferenceRow("1", f"ann {number}", "p", LONG, SHORT), PreferenceRow("1", f"bob {number}", "p", SHORT, LONG),
        PreferenceRow("2", f"ann {number}", "q", LONG, SHORT), PreferenceRow("2", f"bob {number}", "q", SHORT, LONG),
    )]
    whole = expected_when_shuffled([], rows)
    assert whole == {"mean": pytest.approx(0.5), "known": pytest.approx(1.0)}
    monkeypatch.setattr(leaks, "MAX_USERS", 30)
    some = expected_when_shuffled([], rows)
    assert some is not None and some["known"] == pytest.approx(1.0)
    assert some["mean"] == pytest.approx(0.5, abs=0.05)


def test_a_pair_judged_twice_counts_as_often_as_it_was_judged() -> None:
    """Ann once liked either; Bob agrees with half of what she said, and both are half of the rows."""
    rows = [PreferenceRow("1", "ann", "p", "a", "b"), PreferenceRow("1", "ann", "p", "b", "a"),
            PreferenceRow("1", "bob", "p", "a", "b"), PreferenceRow("1", "bob", "p", "a", "b")]
    assert expected_when_shuffled([], rows) == {"mean": pytest.approx(0.75), "known": pytest.approx(1.0)}
