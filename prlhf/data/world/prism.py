"""`builtin:prism`: many people who say who they are, and judge two answers in each turn of their own dialogues.

`builtin:prism_text`: dialogues whose last answer follows wishes, for the model that preference training starts from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prlhf.data.records import Message, PreferenceData, PreferenceRow, ResponseRow
from prlhf.data.world.authored import (
    Topic,
    load_general_text,
    load_heldout_topics,
    load_prompt_templates,
    load_training_topics,
)
from prlhf.data.world.profiles import draw_profile, load_profiles
from prlhf.data.world.psoups import TASTES, draw_phrases
from prlhf.data.world.render import (
    AXES,
    STYLES,
    Request,
    Style,
    Tones,
    draw_instructions,
    render,
    render_general,
)

SEEN_USERS, UNSEEN_USERS = 480, 64  # of each, as many of one taste as of another
TRAIN_DIALOGUES = 12  # of a seen user; every second one is about a topic without known facts
DEV_DIALOGUES = 80  # in all
SEEN_DIALOGUES, UNSEEN_DIALOGUES = 1, 6  # of a user, in evaluation
TURNS = (1, 1, 1, 2, 2, 3)
LABEL_NOISE = 0.1  # how often a person takes the other answer
TEXT_DIALOGUES, TEXT_DEV_DIALOGUES = 14400, 240
GENERAL_SHARE = 0.5  # of the text's dialogues, those about a topic without known facts
WISH_SHARES = (0.0, 0.5, 1.0, 1.0)  # how likely an axis is asked for in a dialogue of the text


@dataclass(frozen=True)
class Person:
    """One user: the style that pleases on each axis, and what the user writes about himself or herself."""

    user_id: str
    taste: Style
    text: str


def build_prism(seed: int) -> PreferenceData:
    """The preference data of 480 seen and 64 unseen users.

    The two answers of a turn differ on one axis; the turns of a dialogue are about different axes, and the earlier
    answers in it say nothing about the taste on the later ones. One judgment in ten goes against the taste.
    train and dev: the training topics, and topics without known facts; eval_seen and eval_unseen: the held-out topics.
    No two dialogues start with the same words.

    Args:
        seed: draws people, dialogues and judgments; the held-out topics are the same for every seed.
    """
    rng = random.Random(f"prism {seed}")
    people = make_people(rng)
    seen, unseen = people[:SEEN_USERS], people[SEEN_USERS:]
    dialogues = _Dialogues(draw_phrases(rng), rng)
    training, heldout = load_training_topics(), load_heldout_topics()
    return PreferenceData(
        train=[
            row
            for person in seen
            for number in range(TRAIN_DIALOGUES)
            for row in dialogues.draw("train", person, training if number % 2 else None)
        ],
        dev=[
            row
            for number in range(DEV_DIALOGUES)
            for row in dialogues.draw("dev", seen[number % len(seen)], training if number % 4 < 2 else None)
        ],
        eval_seen=_evaluation(dialogues, "seen", seen, SEEN_DIALOGUES, heldout),
        eval_unseen=_evaluation(dialogues, "unseen", unseen, UNSEEN_DIALOGUES, heldout),
        source="builtin:prism",
        declared_users=tuple(person.user_id for person in seen),
        ceiling=1 - LABEL_NOISE,
        preferences={person.user_id: _wishes(person.taste) for person in people},
    )


def build_prism_text(seed: int) -> tuple[list[ResponseRow], list[ResponseRow]]:
    """(train, dev): dialogues with wishes as the system's text and a last answer that follows them.

    The model that preference training starts from learns here that what is asked for once, at the start, holds for a
    whole dialogue; the built-in model read single questions. Earlier answers are in any style, wishes are about all
    axes, some or none. Topics: the training topics, and topics without known facts.
    """
    rng = random.Random(f"prism text {seed}")
    rows = [_draw_text(rng) for _ in range(TEXT_DIALOGUES + TEXT_DEV_DIALOGUES)]
    return rows[TEXT_DEV_DIALOGUES:], rows[:TEXT_DEV_DIALOGUES]


def make_people(rng: random.Random) -> list[Person]:
    """Seen people, then unseen ones; no two have the same text."""
    tastes: list[Style] = []
    for count in (SEEN_USERS, UNSEEN_USERS):
        tastes += rng.sample(STYLES * (count // len(STYLES)), count)
    texts: dict[str, Style] = {}
    for taste in tastes:
        text = draw_profile(taste, rng)
        while text in texts:
            text = draw_profile(taste, rng)
        texts[text] = taste
    return [Person(f"user{number:03d}", taste, text) for number, (text, taste) in enumerate(texts.items())]


def _wishes(style: Style) -> str:
    """The style in words, a sentence an axis."""
    return " ".join(taste.wish for taste in TASTES.values() if taste.side == getattr(style, AXES[taste.axis]))


def _evaluation(
    dialogues: _Dialogues, split: str, people: Sequence[Person], count: int, topics: Sequence[Topic]
) -> list[PreferenceRow]:
    return [row for _ in range(count) for person in people for row in dialogues.draw(split, person, topics)]


def _draw_text(rng: random.Random) -> ResponseRow:
    """One dialogue of `builtin:prism_text`."""
    topic = None if rng.random() < GENERAL_SHARE else rng.choice(load_training_topics())
    prompts, facts = _draw_questions(topic, rng.choice(TURNS), rng)
    styles = [rng.choice(STYLES) for _ in prompts]
    messages: list[Message] = []
    for prompt, fact, style in zip(prompts, facts, styles, strict=True):
        answer = render(Request(prompt, topic, fact), style, rng) if topic else render_general(style, rng)
        messages += [Message("user", prompt), Message("assistant", answer)]
    wishes = draw_instructions(styles[-1], rng, share=rng.choice(WISH_SHARES))
    return ResponseRow(tuple(messages[:-1]), messages[-1].content, wishes)


def _draw_questions(topic: Topic | None, num_turns: int, rng: random.Random) -> tuple[list[str], list[int]]:
    """Questions about one topic, and the facts that they ask for (any numbers for a topic without known ones)."""
    if topic is None:
        general = load_general_text()
        name = rng.choice(general.topics)
        questions = [shape.format(topic=name) for shape, fitting in general.questions if name in fitting]
    else:
        name, questions = topic.name, [fact.question for fact in topic.facts]
    facts = rng.sample(range(len(questions)), num_turns)
    first, *others = (questions[fact] for fact in facts)
    opening = rng.choice(load_prompt_templates().question).format(topic=name, question=first)
    follow_ups = rng.sample(load_profiles().follow_ups, len(others))
    return [opening, *(shape.format(question=q) for shape, q in zip(follow_ups, others, strict=True))], facts


class _Dialogues:
    """Dialogues of one world, none with the opening of another."""

    def __init__(self, tones: Tones, rng: random.Random) -> None:
        self._tones = tones
        self._rng = rng
        self._openings: set[str] = set()

    def draw(self, split: str, person: Person, topics: Sequence[Topic] | None) -> list[PreferenceRow]:
        """A row for each turn, the earlier turns with the preferred answer in front.

        Args:
            topics: what it may be about; None: a topic without known facts.
        """
        rng = self._rng
        axes = rng.sample(list(AXES), rng.choice(TURNS))
        name = f"{split}-{len(self._openings):04d}"
        topic, prompts, facts = self._open(topics, len(axes))
        history: list[Message] = []
        rows = []
        for turn, (axis, prompt, fact) in enumerate(zip(axes, prompts, facts, strict=True)):
            history.append(Message("user", prompt))
            answers = self._answer(axis, Request(prompt, topic, fact) if topic else None)
            pleasing = getattr(person.taste, AXES[axis]) != (rng.random() < LABEL_NOISE)
            chosen, rejected = answers[pleasing], answers[not pleasing]
            rows.append(
                PreferenceRow(f"{name}-{turn}", person.user_id, tuple(history), chosen, rejected, person.text)
            )
            history.append(Message("assistant", chosen))
        return rows

    def _open(
        self, topics: Sequence[Topic] | None, num_turns: int
    ) -> tuple[Topic | None, list[str], list[int]]:
        """A topic with questions and facts as of `_draw_questions`, the first in words that open no other dialogue."""
        while True:
            topic = self._rng.choice(topics) if topics else None
            prompts, facts = _draw_questions(topic, num_turns, self._rng)
            if prompts[0] not in self._openings:
                self._openings.add(prompts[0])
                return topic, prompts, facts

    def _answer(self, axis: str, request: Request | None) -> dict[bool, str]:
        """An answer on either side of an axis, alike on the others; about the topic in general without a request."""
        style = self._rng.choice(STYLES)
        styles = {side: replace(style, **{AXES[axis]: side}) for side in (False, True)}
        if request is not None:
            return {side: render(request, style, self._rng, self._tones) for side, style in styles.items()}
        content = self._rng.random()
        return {side: render_general(style, random.Random(content), self._tones) for side, style in styles.items()}
