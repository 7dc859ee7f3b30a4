"""The rule judge: certain of all that the world can render; undecided, not wrong, about the rest."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from prlhf.data.prepared import load_prepared, write_prepared
from prlhf.data.world.authored import load_general_text, load_tone, load_topics
from prlhf.data.world.prism import build_prism, make_people
from prlhf.data.world.psoups import build_psoups
from prlhf.data.world.render import AXES, STYLES, Style, make_requests, render, render_general
from prlhf.data.world.tldr import build_tldr
from prlhf.errors import DataError
from prlhf.evaluation.judges import BANDS, LengthJudge, RuleJudge, judge_of, repeated_4gram_share

SIMPLE = "What a great thing to ask! A cat can see well in dim light."
EXPERT = "Honestly, you could look this up. Reflective retinal membranes substantially enhance nocturnal feline vision."


@pytest.fixture(scope="module")
def judge() -> RuleJudge:
    return RuleJudge()


def count(sentence: str) -> tuple[int, int]:
    """(letters, words) of a sentence; both add up over the sentences of a response."""
    return sum(letter.isalpha() for letter in sentence), len(sentence.split())


def add(*counts: tuple[int, int]) -> tuple[int, int]:
    return sum(letters for letters, _ in counts), sum(words for _, words in counts)


@cache
def bodies(*, expert: bool, informative: bool) -> set[tuple[int, int]]:
    """(letters, words) of every choice of facts, or of general sentences, that a response may hold."""
    general = load_general_text()
    subjects = [([fact.wording for fact in topic.facts], [topic.background]) for topic in load_topics()]
    subjects.append((list(general.answers), list(general.backgrounds)))
    found: set[tuple[int, int]] = set()
    for answers, backgrounds in subjects:
        facts = [count(wording.text(expert=expert)) for wording in answers]
        if informative:
            pairs = {add(*pair) for pair in itertools.combinations(facts, 2)}
            context = {count(wording.text(expert=expert)) for wording in backgrounds}
            found |= {add(*both) for both in itertools.product(pairs, context)}
        else:
            found |= set(facts)
    return found


def every_count(style: Style) -> set[tuple[int, int]]:
    """(letters, words) of every response that can be rendered in a style: all openers, facts, backgrounds, closers."""
    tone = load_tone(friendly=style.friendly)
    frames = {count(opener) for opener in tone.openers}
    if style.informative:
        frames = {add(frame, count(closer)) for frame in frames for closer in tone.closers}
    inner = bodies(expert=style.expert, informative=style.informative)
    return {add(frame, body) for frame in frames for body in inner}


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_register_and_length_are_certain_for_every_response_that_can_be_rendered(style: Style) -> None:
    """Exhaustive: a response's letters and words are the sums of its sentences' (tested below)."""
    register, length = BANDS["register"], BANDS["length"]
    for letters, words in every_count(style):
        assert letters / words >= register[1] if style.expert else letters / words <= register[0]
        assert words >= length[1] if style.informative else words <= length[0]


def test_tone_is_certain_for_every_response_that_can_be_rendered(judge: RuleJudge) -> None:
    """Tone adds up over sentences: the others have none, so a response's sign is its opener's and closer's."""
    sentences = [sentence for topic in load_topics() for sentence in topic.sentences()]
    general = load_general_text()
    for wording in (*general.answers, *general.backgrounds):
        sentences += [wording.simple, wording.expert]
    assert [sentence for sentence in sentences if judge.score(sentence, "tone") != 0] == []
    for friendly, sign in ((True, 1), (False, -1)):
        tone = load_tone(friendly=friendly)
        for phrase in (*tone.openers, *tone.closers):
            assert judge.side(phrase, "tone") == sign, phrase


def test_the_judge_counts_what_the_enumeration_counts_and_finds_the_style(judge: RuleJudge) -> None:
    rng = random.Random(0)
    requests = make_requests(load_topics())
    for number, style in enumerate(STYLES * 250):
        general = number // len(STYLES) % 2
        response = render_general(style, rng) if general else render(rng.choice(requests), style, rng)
        letters, words = count(response)
        assert judge.score(response, "register") == letters / words and judge.score(response, "length") == words
        for axis, field in AXES.items():
            assert judge.side(response, axis) == (1 if getattr(style, field) else -1)
        assert judge.well_formed(response), response


def test_the_judge_agrees_with_every_label_of_a_seed_nobody_has_looked_at(judge: RuleJudge) -> None:
    data = build_psoups(987_654_321)
    for row in data.dev + data.eval_seen:
        assert judge.on_side(row.chosen, row.user_id) and not judge.on_side(row.rejected, row.user_id)
        assert judge.prefers(row.chosen, row.rejected, row.user_id) == 1
        assert judge.prefers(row.rejected, row.chosen, row.user_id) == -1


def test_scores_are_letters_a_word_words_and_warm_minus_cold(judge: RuleJudge) -> None:
    """'Great fun, but dull.': 5 + 3 + 3 + 4 letters in 4 words, two warm words and a cold one."""
    assert judge.score("Great fun, but dull.", "register") == 15 / 4
    assert judge.score("Great fun, but dull.", "length") == 4
    assert judge.score("Great fun, but dull.", "tone") == 1


def test_sides_of_two_texts_read_by_eye(judge: RuleJudge) -> None:
    assert [judge.side(SIMPLE, axis) for axis in ("register", "length", "tone")] == [-1, -1, 1]
    assert [judge.side(EXPERT, axis) for axis in ("register", "length", "tone")] == [1, -1, -1]
    users = ["P1A", "P1B", "P2A", "P2B", "P3A", "P3B"]
    assert [user for user in users if judge.on_side(SIMPLE, user)] == ["P1A", "P2A", "P3A"]
    assert [user for user in users if judge.on_side(EXPERT, user)] == ["P1B", "P2A", "P3B"]
    assert [judge.prefers(SIMPLE, EXPERT, user) for user in users] == [1, -1, 0, 0, 1, -1]


def test_a_text_between_the_sides_is_on_nobodys(judge: RuleJudge) -> None:
    """27 words of 4.5 to 4.8 letters, one word in each tone."""
    between = " ".join(["great", "dull"] + ["seven"] * 20 + ["four"] * 5)
    for axis in AXES:
        assert judge.side(between, axis) == 0
    assert not any(judge.on_side(between, user) for user in ("P1A", "P1B", "P2A", "P2B", "P3A", "P3B"))


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_text_is_on_nobodys_side(judge: RuleJudge, empty: str) -> None:
    assert not any(judge.on_side(empty, user) for user in ("P1A", "P1B", "P2A", "P2B", "P3A", "P3B"))
    assert not judge.well_formed(empty)


def test_an_unknown_user_or_axis_is_named(judge: RuleJudge) -> None:
    with pytest.raises(DataError, match="P9Z"):
        judge.on_side(SIMPLE, "P9Z")
    with pytest.raises(DataError, match="style"):
        judge.side(SIMPLE, "style")


@pytest.mark.parametrize(
    "flaw",
    [
        "cats hunt at night. What a great thing to ask!",  # no capital
        "What a great thing to ask! Cats hunt at night",  # no stop
        "What a great thing to ask! Cats hunt. ",  # two words, and a blank at the end
        "What a great thing to ask! Cats hunt.",  # a sentence of two words
        "What a great thing to ask! Cats zzyzx at night.",  # no such word
        "What a great thing to ask! Cats hunt at at night.",  # a stutter
        "Cats hunt at night.",  # no tone
    ],
)
def test_each_flaw_makes_a_text_ill_formed(judge: RuleJudge, flaw: str) -> None:
    assert judge.well_formed("What a great thing to ask! Cats hunt at night.")
    assert not judge.well_formed(flaw)


def test_words_of_heldout_topics_are_words_and_a_word_may_end_one_sentence_and_start_the_next(judge: RuleJudge) -> None:
    assert judge.well_formed("You picked such a fun one! Water fills caves. Caves hold water.")


def test_repeated_4grams_are_counted_within_a_text() -> None:
    """'a b c d a b c d' has runs abcd bcda cdab dabc abcd: one of five; the same text twice: still one of five."""
    assert repeated_4gram_share(["a b c d a b c d"]) == 1 / 5
    assert repeated_4gram_share(["a b c d a b c d"] * 2) == 1 / 5
    assert repeated_4gram_share(["a b c d", "a b c d"]) == 0.0
    assert repeated_4gram_share(["a b c", ""]) == 0.0


def test_a_person_with_three_tastes_is_served_by_the_share_of_them() -> None:
    """SIMPLE is simple, concise and friendly, EXPERT expert, concise and unfriendly."""
    judge = RuleJudge(
        {
            "ann": {"register": False, "length": False, "tone": True},
            "bob": {"register": True, "length": True, "tone": True},
            "cid": {"register": True, "length": True, "tone": False},
        }
    )
    shares = {user: (judge.serves(SIMPLE, user), judge.serves(EXPERT, user)) for user in ("ann", "bob", "cid")}
    assert shares == {"ann": (1.0, 1 / 3), "bob": (1 / 3, 1 / 3), "cid": (0.0, 2 / 3)}
    assert [judge.prefers(SIMPLE, EXPERT, user) for user in shares] == [1, 0, -1]
    assert judge.on_side(SIMPLE, "ann") and not judge.on_side(EXPERT, "cid")


def test_length_is_in_characters_and_an_empty_answer_serves_nobody() -> None:
    judge = LengthJudge({"long": True, "short": False})
    assert [judge.prefers("ab cd", "abcdef", user) for user in ("long", "short")] == [-1, 1]
    assert [judge.prefers("abc \n", " abc", user) for user in ("long", "short")] == [0, 0]
    assert [judge.prefers("  ", "abc", user) for user in ("long", "short")] == [-1, -1]
    with pytest.raises(DataError, match="the length judge knows long, short"):
        judge.serves("a", "nobody")


def test_the_length_judge_takes_the_answers_that_the_workers_took(tmp_path: Path) -> None:
    data = build_tldr(0)
    write_prepared(tmp_path / "tldr", data)
    for source in (data, load_prepared(tmp_path / "tldr")):
        judge = judge_of(source)
        assert isinstance(judge, LengthJudge) and judge.name == "length"
        assert len(source.eval_seen) == 2000
        assert {judge.prefers(row.chosen, row.rejected, row.user_id) for row in source.eval_seen} == {1}


def test_the_rule_judge_knows_the_tastes_of_each_person_of_prism() -> None:
    judge = judge_of(build_prism(0))
    assert isinstance(judge, RuleJudge)
    for person in make_people(random.Random("prism 0"))[::50]:
        for style in STYLES:
            text = render(make_requests(load_topics()[:1])[0], style, random.Random(1))
            agreeing = sum(getattr(style, name) == getattr(person.taste, name) for name in AXES.values())
            assert judge.serves(text, person.user_id) == pytest.approx(agreeing / 3)


def test_nobody_judges_where_a_users_taste_is_not_known() -> None:
    data = build_tldr(0)
    (first, *_), wishes = data.user_ids(), data.preferences
    assert judge_of(replace(data, preferences={})) is None
    assert judge_of(replace(data, preferences={**wishes, first: "Be kind."})) is None
    assert judge_of(replace(data, train=[], declared_users=())) is None
    assert isinstance(judge_of(build_psoups(0)), RuleJudge)
