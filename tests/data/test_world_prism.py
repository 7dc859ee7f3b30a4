"""builtin:prism: what it promises of its people, dialogues and judgments, for any seed."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache

import pytest

from prlhf.data.clean import shared_pairs
from prlhf.data.load import load_response_rows
from prlhf.data.records import Message, PreferenceData, PreferenceRow, ResponseRow
from prlhf.data.splits import prompt_group
from prlhf.data.world.authored import load_heldout_topics, load_instructions, load_tone
from prlhf.data.world.prism import (
    LABEL_NOISE,
    SEEN_USERS,
    UNSEEN_USERS,
    Person,
    build_prism,
    build_prism_text,
    make_people,
)
from prlhf.data.world.profiles import AGES, draw_profile, load_profiles
from prlhf.data.world.render import AXES, STYLES
from prlhf.evaluation.judges import RuleJudge

SEEDS = (0, 20_260_801)
JUDGE = RuleJudge()
EVAL_PARTS = ("eval_seen", "eval_unseen")


@cache
def prism(seed: int) -> PreferenceData:
    return build_prism(seed)


@cache
def text() -> tuple[list[ResponseRow], list[ResponseRow]]:
    return build_prism_text(0)


@cache
def people(seed: int) -> dict[str, Person]:
    """The people of a world: they are its first draws."""
    return {person.user_id: person for person in make_people(random.Random(f"prism {seed}"))}


def messages(row: PreferenceRow | ResponseRow) -> tuple[Message, ...]:
    assert isinstance(row.prompt, tuple)
    return row.prompt


def all_rows(data: PreferenceData) -> list[PreferenceRow]:
    return [*data.train, *data.dev, *data.eval_seen, *data.eval_unseen]


@cache
def side(text: str, axis: str) -> int:
    return JUDGE.side(text, axis)


def differing_axes(row: PreferenceRow) -> list[str]:
    return [axis for axis in AXES if side(row.chosen, axis) != side(row.rejected, axis)]


def follows_taste(row: PreferenceRow, person: Person) -> bool:
    (axis,) = differing_axes(row)
    return side(row.chosen, axis) == (1 if getattr(person.taste, AXES[axis]) else -1)


@pytest.mark.parametrize("seed", SEEDS)
def test_tastes_are_balanced_among_seen_and_unseen_people(seed: int) -> None:
    everyone = list(people(seed).values())
    assert len(everyone) == SEEN_USERS + UNSEEN_USERS >= 200
    for part in (everyone[:SEEN_USERS], everyone[SEEN_USERS:]):
        assert set(Counter(person.taste for person in part).values()) == {len(part) // len(STYLES)}
    data = prism(seed)
    assert data.user_ids() == [person.user_id for person in everyone[:SEEN_USERS]]
    assert {row.user_id for row in data.eval_unseen} == {person.user_id for person in everyone[SEEN_USERS:]}
    assert {row.user_id for row in data.eval_seen} == set(data.user_ids())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_taste_follows_from_what_a_person_writes(seed: int) -> None:
    """One remark on each axis, which no person of the other taste makes."""
    profiles = load_profiles()
    for person in people(seed).values():
        for axis, name in AXES.items():
            told = {
                side for side in (False, True)
                for remark in (*profiles.stated[axis, side], *profiles.shown[axis, side]) if remark.text in person.text
            }
            assert told == {getattr(person.taste, name)}, person.text
    assert len({person.text for person in people(seed).values()}) == len(people(seed))


def test_about_half_of_the_remarks_name_the_taste() -> None:
    named = [
        remark.text in person.text
        for person in people(0).values()
        for axis, name in AXES.items()
        for remark in load_profiles().stated[axis, getattr(person.taste, name)]
    ]
    assert 0.4 < sum(named) / (len(AXES) * len(people(0))) < 0.6  # 600 draws of one half: standard deviation .02


def test_no_sentence_of_a_profile_says_two_things() -> None:
    profiles = load_profiles()
    groups = [*profiles.stated.values(), *profiles.shown.values(), profiles.lives, profiles.asides, profiles.schooling]
    sentences = [remark.text for group in groups for remark in group]
    assert len(set(sentences)) == len(sentences)
    assert all(text[0].isupper() and text.endswith(".") for text in sentences)
    assert all(AGES[0] <= low <= high <= AGES[1] for group in groups for low, high in (each.ages for each in group))
    assert all(len(group) >= 8 for group in groups)


def test_every_profile_gives_an_age_at_which_all_of_it_can_be_said() -> None:
    profiles, rng = load_profiles(), random.Random(5)
    groups = [*profiles.stated.values(), *profiles.shown.values(), profiles.lives, profiles.asides, profiles.schooling]
    for _ in range(200):
        text = draw_profile(rng.choice(STYLES), rng)
        (age,) = (int(word.strip(".,")) for word in text.split() if word.strip(".,").isdigit())
        said = [remark for group in groups for remark in group if remark.text in text]
        assert all(low <= age <= high for low, high in (remark.ages for remark in said)), text
        assert sum(remark.is_work for remark in said) >= 1, text


@pytest.mark.parametrize("seed", SEEDS)
def test_the_two_answers_of_a_turn_differ_on_one_axis_and_one_judgment_in_ten_is_noise(seed: int) -> None:
    data = prism(seed)
    for part in ("train", *EVAL_PARTS):
        rows = getattr(data, part)
        assert all(len(differing_axes(row)) == 1 for row in rows)
        share = sum(follows_taste(row, people(seed)[row.user_id]) for row in rows) / len(rows)
        spread = (LABEL_NOISE * (1 - LABEL_NOISE) / len(rows)) ** 0.5
        assert abs(share - (1 - LABEL_NOISE)) < 4 * spread, part
    assert data.ceiling == 1 - LABEL_NOISE


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_knows_the_answer_without_the_user(seed: int) -> None:
    """On each axis either side is chosen about as often: the best rule without users is a coin."""
    data = prism(seed)
    for part in ("train", *EVAL_PARTS):
        rows = getattr(data, part)
        for axis in AXES:
            sides = [side(row.chosen, axis) for row in rows if differing_axes(row) == [axis]]
            assert abs(sum(sides)) < 4 * len(sides) ** 0.5, (part, axis)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dialogue_goes_on_with_the_preferred_answer_and_another_axis(seed: int) -> None:
    data = prism(seed)
    by_id = {row.pair_id: row for row in all_rows(data)}
    assert len(by_id) == len(all_rows(data))
    for row in by_id.values():
        name, turn = row.pair_id.rsplit("-", 1)
        earlier = [by_id[f"{name}-{number}"] for number in range(int(turn))]
        roles = [message.role for message in messages(row)]
        assert roles == ["user", "assistant"] * len(earlier) + ["user"]
        assert [message.content for message in messages(row)[1::2]] == [before.chosen for before in earlier]
        axes = [differing_axes(each)[0] for each in (*earlier, row)]
        assert len(set(axes)) == len(axes)
    assert {len(messages(row)) for row in data.train} == {1, 3, 5}


@pytest.mark.parametrize("seed", SEEDS)
def test_evaluation_is_about_topics_and_openings_that_training_never_meets(seed: int) -> None:
    data = prism(seed)
    heldout = [word for topic in load_heldout_topics() for word in topic.sentences()]
    for row in (*data.train, *data.dev):
        text = " ".join((*(message.content for message in messages(row)), row.chosen, row.rejected))
        assert not any(sentence in text for sentence in heldout)
    for part in EVAL_PARTS:
        assert all(any(sentence in row.chosen for sentence in heldout) for row in getattr(data, part))
    openings = [prompt_group(row) for row in all_rows(data) if len(messages(row)) == 1]
    assert len(set(openings)) == len(openings)
    located = {name: [("", row) for row in getattr(data, name)] for name in ("train", "dev", *EVAL_PARTS)}
    assert not shared_pairs(located["train"] + located["dev"], located["eval_seen"] + located["eval_unseen"])


def test_texts_and_questions_hold_no_word_of_a_tone() -> None:
    """A warm word in a person's dialogue would tell the taste; the profiles may say it, the questions may not."""
    words = load_tone(friendly=True).words | load_tone(friendly=False).words
    for row in prism(0).eval_seen:
        for message in messages(row)[::2]:
            assert not words & {word.strip(".,?:").lower() for word in message.content.split()}, message.content


def test_a_world_is_a_function_of_its_seed() -> None:
    assert build_prism(0) == prism(0) and prism(0).train[0] != prism(SEEDS[1]).train[0]


def test_every_row_carries_its_persons_text() -> None:
    data = prism(0)
    assert all(row.user_text == people(0)[row.user_id].text for row in all_rows(data))
    assert data.user_texts() == {user_id: person.text for user_id, person in people(0).items()}


def test_each_user_has_a_wish_for_each_axis_of_the_taste() -> None:
    wishes = prism(0).preferences
    assert set(wishes) == set(people(0))
    for user_id, person in people(0).items():
        assert wishes[user_id].count(".") == 3
        assert ("Keep it short." in wishes[user_id]) != person.taste.informative
        assert ("technical" in wishes[user_id]) == person.taste.expert
        assert ("warm" in wishes[user_id]) == person.taste.friendly


def test_the_last_answer_of_the_text_follows_its_wishes() -> None:
    """Wishes about all axes, some or none, a sentence an axis; without them either side is as likely."""
    counts: Counter[int] = Counter()
    for row in text()[0]:
        told = {
            axis: wanted for axis in AXES for wanted in (False, True)
            if any(wish in row.user_text for wish in load_instructions(axis, side=wanted))
        }
        assert len(re.findall(r"[.]( |$)", row.user_text)) == len(told), row.user_text
        assert all(side(row.response, axis) == (1 if wanted else -1) for axis, wanted in told.items()), row
        counts[len(told)] += 1
    total = sum(counts.values())
    # Of four dialogues one has no wish, one each of three with chance one half, two have all.
    expected = {0: 1 / 4 + 1 / 32, 1: 3 / 32, 2: 3 / 32, 3: 1 / 2 + 1 / 32}
    for number, share in expected.items():
        assert abs(counts[number] / total - share) < 4 * (share * (1 - share) / total) ** 0.5
    for axis in AXES:
        sides = [side(row.response, axis) for row in text()[0] if not row.user_text]
        assert abs(sum(sides)) < 4 * len(sides) ** 0.5, axis


def test_the_text_has_dialogues_in_any_style_about_topics_that_are_not_held_out() -> None:
    heldout = [sentence for topic in load_heldout_topics() for sentence in topic.sentences()]
    names = [topic.name for topic in load_heldout_topics()]
    train, dev = text()
    for row in (*train, *dev):
        roles = [message.role for message in messages(row)]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert not any(name in messages(row)[0].content for name in names), messages(row)[0]
        assert not any(sentence in row.response for sentence in heldout)
    assert {len(messages(row)) for row in train} == {1, 3, 5}
    answered = [row for row in train if len(messages(row)) > 1]
    for axis in AXES:  # an earlier answer says nothing about the last one
        alike = [side(messages(row)[1].content, axis) * side(row.response, axis) for row in answered]
        assert abs(sum(alike)) < 4 * len(alike) ** 0.5, axis


def test_the_text_is_a_source_of_data_and_a_function_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prlhf.data.world.prism.TEXT_DIALOGUES", 40)
    first, again, other = (load_response_rows("builtin:prism_text", seed=seed, eval_prompts=0.0) for seed in (0, 0, 1))
    assert first == again == build_prism_text(0) and first[0][0] != other[0][0]
