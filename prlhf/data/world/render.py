"""From authored sentences to prompts and to responses in any of the eight styles."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from prlhf.data.world.authored import (
    Tone,
    Topic,
    Wording,
    load_general_text,
    load_instructions,
    load_prompt_templates,
    load_tone,
)

GENERAL_TOPIC_PROMPTS = 0.2  # share of the prompts about unknown topics that ask no question


@dataclass(frozen=True)
class Style:
    """How a response is written: one side of each of the three axes."""

    expert: bool
    informative: bool
    friendly: bool


Tones = Mapping[bool, Tone]
STYLES = tuple(Style(*sides) for sides in product((False, True), repeat=3))
# The axes by name, and the field of Style that says the side.
AXES = {"register": "expert", "length": "informative", "tone": "friendly"}


@dataclass(frozen=True)
class Request:
    """A prompt, with what it asks about: a fact's index, or None for the topic in general."""

    prompt: str
    topic: Topic
    fact: int | None


def make_requests(topics: Iterable[Topic]) -> list[Request]:
    """Every prompt about the topics: each template with each question and with each topic, no prompt twice."""
    templates = load_prompt_templates()
    requests = []
    for topic in topics:
        for template in templates.topic:
            requests.append(Request(template.format(topic=topic.name), topic, None))
        for index, fact in enumerate(topic.facts):
            for template in templates.question:
                prompt = template.format(topic=topic.name, question=fact.question)
                requests.append(Request(prompt, topic, index))
    return requests


def render(request: Request, style: Style, rng: random.Random, tones: Tones | None = None) -> str:
    """A response: opener and the asked fact; if informative also the background, another fact and a closer.

    Args:
        tones: by `friendly`, the phrases to draw from; all of them by default.
        rng: draws the opener, the closer, the other fact, and the asked fact if the request leaves it open.
    """
    topic = request.topic
    asked = rng.randrange(len(topic.facts)) if request.fact is None else request.fact
    other = rng.choice([index for index in range(len(topic.facts)) if index != asked])
    return _join(topic.facts[asked].wording, topic.background, topic.facts[other].wording, style, rng, tones)


def render_general(style: Style, rng: random.Random, tones: Tones | None = None) -> str:
    """A response about a topic without known facts: the same shape, of sentences that hold of nearly any topic.

    Equal random states give the same content in every style.

    Args: as for `render`.
    """
    general = load_general_text()
    first, other = rng.sample(general.answers, 2)
    return _join(first, rng.choice(general.backgrounds), other, style, rng, tones)


def draw_general_prompt(rng: random.Random) -> str:
    """A prompt about a topic without known facts."""
    general = load_general_text()
    templates = load_prompt_templates()
    if rng.random() < GENERAL_TOPIC_PROMPTS:
        topic = rng.choice(general.topics)
        return rng.choice(templates.topic).format(topic=topic)
    shape, fitting_topics = rng.choice(general.questions)
    topic = rng.choice(fitting_topics)
    return rng.choice(templates.question).format(topic=topic, question=shape.format(topic=topic))


def draw_instructions(style: Style, rng: random.Random, *, share: float) -> str:
    """Sentences that ask for some of the sides of a style, in any order; each axis is asked for with chance `share`."""
    asked = [axis for axis in AXES if rng.random() < share]
    rng.shuffle(asked)
    return " ".join(rng.choice(load_instructions(axis, side=getattr(style, AXES[axis]))) for axis in asked)


def _join(
    asked: Wording,
    background: Wording,
    other: Wording,
    style: Style,
    rng: random.Random,
    tones: Tones | None = None,
) -> str:
    tone = tones[style.friendly] if tones else load_tone(friendly=style.friendly)
    sentences = [rng.choice(tone.openers), asked.text(expert=style.expert)]
    if style.informative:
        sentences += [wording.text(expert=style.expert) for wording in (background, other)]
        sentences.append(rng.choice(tone.closers))
    return " ".join(sentences)
