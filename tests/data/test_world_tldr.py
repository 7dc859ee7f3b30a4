"""The built-in posts and summaries: what they promise of their text, their splits and their labels, for any seed."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from functools import cache

import pytest

from prlhf.data.load import load_preference_data, load_response_rows
from prlhf.data.records import PreferenceData, PreferenceRow, ResponseRow
from prlhf.data.world.authored import Situation, load_posts
from prlhf.data.world.posts import draw_posts, is_reserved
from prlhf.data.world.tldr import build_tldr, build_tldr_text

SEEDS = (0, 1, 20_260_801)
SITUATIONS = (*load_posts().training, *load_posts().heldout)


@cache
def world(seed: int) -> PreferenceData:
    return build_tldr(seed)


@cache
def text() -> tuple[list[ResponseRow], list[ResponseRow]]:
    return build_tldr_text(0)


def num_sentences(summary: str) -> int:
    return len(re.findall(r"[.?!](?= [A-Z\"]|$)", summary))


def prefers_longer(rows: list[PreferenceRow]) -> dict[str, bool]:
    """Each user's taste; fails where a user is not true to it."""
    tastes: dict[str, bool] = {}
    for row in rows:
        longer = len(row.chosen) > len(row.rejected)
        assert tastes.setdefault(row.user_id, longer) == longer, row
    return tastes


def slots_of(text: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", text))


def sentences_of(situation: Situation) -> list[str]:
    pairs = [*situation.points, situation.question]
    return [*(text for pair in pairs for text in pair), *situation.gists]


def test_there_are_48_situations_to_train_on_and_12_held_out_with_slots_that_are_used() -> None:
    assert (len(load_posts().training), len(load_posts().heldout)) == (48, 12)
    for situation in SITUATIONS:
        everything = " ".join([*situation.titles, *sentences_of(situation)])
        assert slots_of(everything) == set(situation.slots), situation.titles
        assert len(situation.points) == 4 and len(situation.titles) == len(situation.gists) == 2
        for values in situation.slots.values():
            assert len(set(values)) == len(values) >= 3, situation.titles


def test_a_summary_says_nothing_that_its_post_does_not() -> None:
    """Every post tells the first two points; the other two are told, and summarized, by turns."""
    for situation in SITUATIONS:
        always = slots_of(" ".join((situation.points[0][0], situation.points[1][0], situation.question[0])))
        assert slots_of(" ".join((*situation.gists, situation.question[1]))) <= always, situation.gists
        for point, summary in situation.points:
            assert slots_of(summary) <= always | slots_of(point), summary


def test_sentences_are_single_plain_and_authored_once() -> None:
    sentences = [sentence for situation in SITUATIONS for sentence in sentences_of(situation)]
    counts = Counter(text for situation in SITUATIONS for text in set(sentences_of(situation)) if "{" in text)
    assert [sentence for sentence, count in counts.items() if count > 1] == []
    for sentence in sentences:
        assert sentence.isascii() and re.fullmatch(r"[A-Z{][^.!?]+[.?]", sentence), sentence
        assert len(sentence.split()) <= 20, sentence
    for situation in SITUATIONS:
        for post_text, summary in situation.points:
            assert len(summary) <= len(post_text), summary


def test_no_article_stands_wrongly_before_what_fills_a_slot() -> None:
    """Neither "a old van" nor "an new one": slots are filled independently, so every value must fit."""
    rng = random.Random(0)
    for reserved in (False, True):
        for post in draw_posts(SITUATIONS, 3000, rng, reserved=reserved):
            shown = f"{post.prompt} {' '.join((*post.points, *post.gists, post.question))}"
            assert not re.search(r"\b[Aa] [aeio]\w|\b[Aa]n [^aeiouAEIOUh]", shown), shown
            assert "{" not in shown and "  " not in shown, shown


@pytest.mark.parametrize("seed", SEEDS)
def test_every_worker_is_true_to_a_taste_and_two_to_four_of_either_ten_prefer_the_shorter(seed: int) -> None:
    data = world(seed)
    seen = prefers_longer(data.train + data.dev + data.eval_seen)
    unseen = prefers_longer(data.eval_unseen)
    assert len(seen) == len(unseen) == 10 and not set(seen) & set(unseen)
    assert set(data.user_ids()) == set(seen)
    assert all(2 <= list(tastes.values()).count(False) <= 4 for tastes in (seen, unseen))
    assert sum(len(row.chosen) > len(row.rejected) for row in data.train) > 0.5 * len(data.train)
    assert {user: "short" not in data.preferences[user] for user in (seen | unseen)} == seen | unseen


def test_in_the_committed_world_workers_4_5_and_6_prefer_the_shorter_summary_as_in_the_paper() -> None:
    data = world(0)
    seen = prefers_longer(data.train)
    counts = Counter(row.user_id for row in data.train + data.dev)
    assert [counts[user] for user in data.user_ids()] == sorted(counts.values(), reverse=True)
    assert [rank for rank, user in enumerate(data.user_ids(), start=1) if not seen[user]] == [4, 5, 6]


@pytest.mark.parametrize("seed", SEEDS)
def test_evaluation_is_about_other_situations_and_shares_no_post_with_training_or_text(seed: int) -> None:
    data = world(seed)
    train, dev, evaluation = ({row.prompt for row in rows} for rows in (data.train, data.dev, data.eval_seen))
    assert not train & dev and (len(train | dev), len(evaluation)) == (1700, 200)
    assert all(is_reserved(str(prompt)) for prompt in evaluation)
    assert not any(is_reserved(str(prompt)) for prompt in train | dev)
    heldout = [situation.question[0] for situation in load_posts().heldout if "{" not in situation.question[0]]
    assert len(heldout) == 12 and all(any(question in str(prompt) for question in heldout) for prompt in evaluation)
    read = "\n".join(row.response for part in text() for row in part)
    assert not any(str(prompt) in read for prompt in evaluation)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_longer_summary_has_more_sentences_or_is_less_than_a_fifth_longer(seed: int) -> None:
    close = []
    for row in world(seed).train + world(seed).eval_seen:
        shorter, longer = sorted((row.chosen, row.rejected), key=len)
        assert len(shorter) < len(longer)
        gap = num_sentences(longer) - num_sentences(shorter)
        close.append(len(shorter) > 0.8 * len(longer))
        assert (gap == 0) if close[-1] else (gap > 0), row
    assert 0.05 < sum(close) / len(close) < 0.3


@pytest.mark.parametrize("seed", SEEDS)
def test_workers_judge_unequally_many_training_rows_and_200_held_out_ones_each(seed: int) -> None:
    data = world(seed)
    counts = Counter(row.user_id for row in data.train)
    assert min(counts.values()) >= 200 and max(counts.values()) >= 1.2 * min(counts.values())
    for rows in (data.eval_seen, data.eval_unseen):
        assert set(Counter(row.user_id for row in rows).values()) == {200}
    judged = defaultdict(set)
    for row in data.eval_seen + data.eval_unseen:
        judged[row.pair_id].add(row.user_id)
    assert {len(users) for users in judged.values()} == {20}, "all twenty judge the same pairs"


def test_the_text_has_all_situations_and_summaries_of_one_to_four_sentences_alike() -> None:
    """6,000 rows: 4 sd of a binomial share of a quarter are 0.023."""
    train, dev = text()
    assert len(train) == 6000 and not {row.response for row in train} & {row.response for row in dev}
    sizes = Counter(num_sentences(row.response.split("\nTL;DR:\n")[1]) for row in train)
    assert set(sizes) == {1, 2, 3, 4} and all(abs(size / 6000 - 0.25) < 0.023 for size in sizes.values())
    assert all(row.prompt == "" for row in train)


def test_the_same_seed_gives_the_same_world_and_another_seed_another() -> None:
    assert build_tldr(0) == world(0) and build_tldr_text(0) == text()
    prompts = [{row.prompt for row in world(seed).train} for seed in (0, 1)]
    # Of 1,140 posts at most one in twenty would be shared.
    assert len(prompts[0] & prompts[1]) < 0.05 / 1140 * len(prompts[0]) * len(prompts[1])


def test_both_are_sources_of_data() -> None:
    assert load_preference_data("builtin:tldr", seed=0, eval_prompts=0.0, unseen_users=0.0) == world(0)
    assert load_response_rows("builtin:tldr_text", seed=0, eval_prompts=0.0) == text()
