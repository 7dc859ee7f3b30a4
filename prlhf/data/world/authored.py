"""The authored text of the built-in world: facts in two registers, phrases in two tones, prompt templates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

WORLD_DIR = Path(__file__).parent
TOPIC_FILES = ("nature", "life", "science", "society")
# Six of each file: of the topics that no other topic's text names, those whose name has the lowest sha256. Written out,
# so that mending a sentence cannot move a topic out of what a model was pretrained on, or into it.
HELDOUT_TOPICS = frozenset(
    {
        "caves", "deserts", "parrots", "penguins", "spiders", "whales",
        "dreams", "frogs", "hunger", "roses", "snakes", "turtles",
        "Jupiter", "black holes", "compasses", "lasers", "microscopes", "robots",
        "bicycles", "coffee", "hot air balloons", "maps", "potatoes", "tomatoes",
    }
)


@dataclass(frozen=True)
class Wording:
    """One statement in two registers, each authored on its own."""

    simple: str
    expert: str

    def text(self, *, expert: bool) -> str:
        """The sentence in one register."""
        return self.expert if expert else self.simple


@dataclass(frozen=True)
class Fact:
    """A fact and the question that it answers."""

    question: str
    wording: Wording


@dataclass(frozen=True)
class Topic:
    """A topic: its name as it stands after "about", its background and its facts."""

    name: str
    background: Wording
    facts: tuple[Fact, ...]

    def sentences(self) -> list[str]:
        """Every authored sentence of the topic: questions, facts and background, in both registers."""
        wordings = [self.background, *(fact.wording for fact in self.facts)]
        return [
            *(fact.question for fact in self.facts),
            *(wording.simple for wording in wordings),
            *(wording.expert for wording in wordings),
        ]


@dataclass(frozen=True)
class Tone:
    """The sentences that may open or close a response in one tone, and the words that give the tone away.

    Every opener and closer holds at least one of the words; nothing else in a response holds any.
    """

    openers: tuple[str, ...]
    closers: tuple[str, ...]
    words: frozenset[str]


@dataclass(frozen=True)
class PromptTemplates:
    """Neutral prompts: around a question (and perhaps its topic), or around a topic in general."""

    question: tuple[str, ...]
    topic: tuple[str, ...]


@dataclass(frozen=True)
class GeneralText:
    """What can be said of a topic without knowing a fact about it, and how such topics are asked about.

    Args:
        answers: true of nearly any topic; none names one.
        backgrounds: likewise.
        questions: each shape with {topic}, and the topics that fit it: all, or the plural nouns alone.
        topics: all of them, plural nouns first.
    """

    answers: tuple[Wording, ...]
    backgrounds: tuple[Wording, ...]
    questions: tuple[tuple[str, tuple[str, ...]], ...]
    topics: tuple[str, ...]


@dataclass(frozen=True)
class Situation:
    """A quandary that posts tell of, in sentences with {slots}.

    Args:
        titles: of the post; any of them.
        slots: name -> what may stand there; all combinations make sense.
        points: in order, each as the post tells it and as a summary does.
        question: likewise.
        gists: the whole in one short sentence; any of them.
    """

    titles: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]
    points: tuple[tuple[str, str], ...]
    question: tuple[str, str]
    gists: tuple[str, ...]


@dataclass(frozen=True)
class PostText:
    """What posts are made of; no sentence of a held-out situation stands in another one."""

    openers: tuple[str, ...]
    closers: tuple[str, ...]
    training: tuple[Situation, ...]
    heldout: tuple[Situation, ...]


@cache
def load_topics() -> tuple[Topic, ...]:
    """All authored topics, file by file."""
    return tuple(topic for name in TOPIC_FILES for topic in load_topic_file(name))


@cache
def load_tone(*, friendly: bool) -> Tone:
    """The friendly or the unfriendly tone."""
    data = _load_json("tone.json")
    key = "friendly" if friendly else "unfriendly"
    return Tone(
        openers=tuple(data["openers"][key]),
        closers=tuple(data["closers"][key]),
        words=frozenset(data["warm" if friendly else "cold"]),
    )


@cache
def load_prompt_templates() -> PromptTemplates:
    """The authored prompt templates."""
    prompts = _load_json("tone.json")["prompts"]
    return PromptTemplates(question=tuple(prompts["question"]), topic=tuple(prompts["topic"]))


@cache
def load_general_text() -> GeneralText:
    """The authored text for topics without facts."""
    data = _load_json("general.json")
    plural_topics = tuple(data["topics_plural"])
    topics = (*plural_topics, *data["topics_any"])
    plural_questions = [(shape, plural_topics) for shape in data["questions_plural"]]
    questions = [(shape, topics) for shape in data["questions_any"]]
    return GeneralText(
        answers=tuple(Wording(**entry) for entry in data["answers"]),
        backgrounds=tuple(Wording(**entry) for entry in data["backgrounds"]),
        questions=(*plural_questions, *questions),
        topics=topics,
    )


@cache
def load_instructions(axis: str, *, side: bool) -> tuple[str, ...]:
    """Sentences that ask for one side of an axis, as a user might write them before a question."""
    return tuple(_load_json("instructions.json")[axis][str(side)])


@cache
def load_heldout_topics() -> tuple[Topic, ...]:
    """The topics that pretraining, training and dev never see; the same for every seed."""
    return tuple(topic for topic in load_topics() if topic.name in HELDOUT_TOPICS)


@cache
def load_training_topics() -> tuple[Topic, ...]:
    """All topics but the held-out ones."""
    return tuple(topic for topic in load_topics() if topic.name not in HELDOUT_TOPICS)


@cache
def load_topic_file(name: str) -> tuple[Topic, ...]:
    """The topics of one of TOPIC_FILES."""
    return tuple(
        Topic(
            name=entry["topic"],
            background=Wording(**entry["background"]),
            facts=tuple(Fact(fact["question"], Wording(fact["simple"], fact["expert"])) for fact in entry["facts"]),
        )
        for entry in _load_json(f"topics/{name}.json")
    )


@cache
def load_posts() -> PostText:
    """The authored text of posts and their summaries."""
    data = _load_json("posts.json")
    training, heldout = (tuple(map(_situation, data[part])) for part in ("training", "heldout"))
    return PostText(tuple(data["openers"]), tuple(data["closers"]), training, heldout)


def _situation(entry: dict[str, Any]) -> Situation:
    return Situation(
        titles=tuple(entry["titles"]),
        slots={name: tuple(values) for name, values in entry["slots"].items()},
        points=tuple((text, summary) for text, summary in entry["points"]),
        question=(entry["question"][0], entry["question"][1]),
        gists=tuple(entry["gists"]),
    )


def _load_json(path: str) -> Any:
    return json.loads((WORLD_DIR / path).read_text(encoding="utf-8"))
