"""The bigram ranker learns each user's own words, and nothing from rows that words do not decide."""

from __future__ import annotations

import random

from examples.bigram_ranker import count_features, rank_accuracies
from prlhf.data.records import PreferenceRow

WORDS = ["red", "green", "blue", "warm", "cold", "round", "flat", "old", "new", "tall"]


def _row(number: int, user_id: str, chosen: str, rejected: str) -> PreferenceRow:
    return PreferenceRow(pair_id=f"{number} {user_id}", user_id=user_id, prompt="?", chosen=chosen, rejected=rejected)


def _opposed_rows(count: int, seed: int) -> list[PreferenceRow]:
    """Two users: one always takes the text with "please", the other never."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        plain, polite = " ".join(rng.choices(WORDS, k=6)), " ".join([*rng.choices(WORDS, k=5), "please"])
        rows += [_row(number, "polite", polite, plain), _row(number, "rude", plain, polite)]
    return rows


def test_features_are_words_and_neighbours() -> None:
    assert count_features("No, no!") == {
        "<": 1, "no": 2, ",": 1, "!": 1, ">": 1, "< no": 1, "no ,": 1, ", no": 1, "no !": 1, "! >": 1
    }


def test_each_user_gets_a_ranker_of_its_own() -> None:
    accuracies = rank_accuracies(_opposed_rows(60, 0), _opposed_rows(20, 1), _opposed_rows(50, 2))
    assert accuracies == {"polite": 1.0, "rude": 1.0}


def test_labels_without_a_rule_stay_near_chance() -> None:
    """300 held-out rows: four standard deviations of a fair coin are 0.115."""
    rng = random.Random(3)
    rows = [_row(i, "u", " ".join(rng.choices(WORDS, k=6)), " ".join(rng.choices(WORDS, k=6))) for i in range(600)]
    assert abs(rank_accuracies(rows[:250], rows[250:300], rows[300:])["u"] - 0.5) < 0.115
