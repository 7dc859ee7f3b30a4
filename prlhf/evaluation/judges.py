"""Judges of answers by rule, where it is known what each user likes.

The rule judge of `builtin:psoups` and `builtin:prism` is certain of all that the world can render and cautious about
the rest; the length judge is that of the paper's experiment on TL;DR.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from prlhf.data.load import BUILTIN_PRISM, BUILTIN_PSOUPS
from prlhf.data.records import PreferenceData
from prlhf.data.tldr import length_tastes
from prlhf.data.world.authored import load_general_text, load_tone, load_topics
from prlhf.data.world.psoups import TASTES, sides_in_words
from prlhf.data.world.render import AXES
from prlhf.errors import DataError

# By axis: a score up to the first number is the side that Style calls False (simple, concise, unfriendly), one from the
# second on the other (expert, informative, friendly); between them the judge is undecided. The world's own responses
# score register <= 4.44 or >= 4.87, length <= 21 or >= 34, tone <= -1 or >= 1.
BANDS = {"register": (4.5, 4.8), "length": (24, 30), "tone": (-1, 1)}
MIN_SENTENCE_WORDS = 3
SHOWN_USERS = 8


class Judge(ABC):
    """Says how well an answer serves a user; of two answers the one that serves better wins."""

    name: str

    @abstractmethod
    def serves(self, text: str, user_id: str) -> float:
        """More is better, 0 the worst; comparable between answers for one user."""

    def prefers(self, text_a: str, text_b: str, user_id: str) -> int:
        """1 if the first text serves the user better, -1 if the second does, 0 (a tie) otherwise."""
        first, second = self.serves(text_a, user_id), self.serves(text_b, user_id)
        return int(first > second) - int(first < second)


def judge_of(data: PreferenceData) -> Judge | None:
    """Who can judge answers to the seen users of these data; None where their tastes are not known."""
    users = set(data.user_ids())
    if data.world == BUILTIN_PSOUPS:
        return RuleJudge() if users <= TASTES.keys() else None
    if data.world == BUILTIN_PRISM:
        sides = {user: sides_in_words(words) for user, words in data.preferences.items()}
        return RuleJudge(sides) if users <= sides.keys() else None
    tastes = length_tastes(data.preferences)
    return LengthJudge(tastes) if users and users <= tastes.keys() else None


class LengthJudge(Judge):
    """Serves a user by length alone, in characters; an empty answer serves nobody.

    Args:
        tastes: user id -> whether the user likes the longer of two texts.
    """

    name = "length"

    def __init__(self, tastes: Mapping[str, bool]) -> None:
        self._tastes = tastes

    def serves(self, text: str, user_id: str) -> float:
        """The number of characters, or to who likes short texts one over it.

        Raises: DataError: the user's taste is not known.
        """
        if user_id not in self._tastes:
            raise DataError(f"user {user_id!r}: the length judge knows {_some(self._tastes)}")
        length = len(text.strip())
        return float(length) if self._tastes[user_id] or not length else 1 / length


class RuleJudge(Judge):
    """Tells the side of a text on each axis, by counting letters, words, and warm and cold words.

    Args:
        tastes: user id -> axis -> the side that the user likes; None: those of the six users of `builtin:psoups`.
    """

    name = "rule"

    def __init__(self, tastes: Mapping[str, Mapping[str, bool]] | None = None) -> None:
        self._tastes = {user: {taste.axis: taste.side} for user, taste in TASTES.items()} if tastes is None else tastes
        self._warm = load_tone(friendly=True).words
        self._cold = load_tone(friendly=False).words
        tones = [load_tone(friendly=friendly) for friendly in (True, False)]
        sentences = [sentence for tone in tones for sentence in (*tone.openers, *tone.closers)]
        sentences += [sentence for topic in load_topics() for sentence in topic.sentences()]
        general = load_general_text()
        for wording in (*general.answers, *general.backgrounds):
            sentences += [wording.simple, wording.expert]
        self._vocabulary = {word for sentence in sentences for word in _words(sentence)}

    def score(self, text: str, axis: str) -> float:
        """Register: mean letters a word; length: words; tone: warm words minus cold words.

        Raises: DataError: no such axis, or a text without a word.
        """
        words = _words(text)
        if axis not in AXES:
            raise DataError(f"axis {axis!r}: expected one of {', '.join(AXES)}")
        if not words:
            raise DataError(f"a text without a word has no {axis}; leave it out or count it as undecided")
        if axis == "register":
            return sum(letter.isalpha() for word in words for letter in word) / len(words)
        if axis == "length":
            return len(words)
        return sum((word in self._warm) - (word in self._cold) for word in words)

    def side(self, text: str, axis: str) -> int:
        """1: expert, informative or friendly; -1: simple, concise or unfriendly; 0: undecided, as is an empty text."""
        if not _words(text):
            return 0
        score = self.score(text, axis)
        low, high = BANDS[axis]
        return int(score >= high) - int(score <= low)

    def serves(self, text: str, user_id: str) -> float:
        """Of the axes on which the user has a taste, the share on which the text is certainly on the user's side.

        Raises: DataError: the user's tastes are not known.
        """
        if user_id not in self._tastes:
            raise DataError(f"user {user_id!r}: the rule judge knows {_some(self._tastes)}")
        tastes = self._tastes[user_id]
        return sum(self.side(text, axis) == (1 if side else -1) for axis, side in tastes.items()) / len(tastes)

    def on_side(self, text: str, user_id: str) -> bool:
        """Whether the text is certainly on the user's side on every axis on which the user has a taste.

        Raises: DataError: the user's tastes are not known.
        """
        return self.serves(text, user_id) == 1

    def well_formed(self, text: str) -> bool:
        """Whether the text reads like the world's: whole sentences of its words, one of them in a tone, no stutter.

        A capital first, a stop last, at least three words a sentence, every word one of the world's (held-out topics
        included), no word twice in a row within a sentence, and at least one warm or cold word.
        """
        words = _words(text)
        sentences = [_words(sentence) for sentence in re.split(r"(?<=[.!?])\s+", text)]
        return (
            text[:1].isupper()
            and text.endswith((".", "!", "?"))
            and all(len(sentence) >= MIN_SENTENCE_WORDS for sentence in sentences)
            and all(word in self._vocabulary for word in words)
            and not any(map(_has_stutter, sentences))
            and any(word in self._warm or word in self._cold for word in words)
        )


def repeated_4gram_share(texts: Sequence[str]) -> float:
    """Of all runs of four words, pooled over the texts, the share that its own text had before; 0 if there is none."""
    num_runs = num_repeated = 0
    for text in texts:
        words = _words(text)
        runs = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
        num_runs += len(runs)
        num_repeated += len(runs) - len(set(runs))
    return num_repeated / num_runs if num_runs else 0.0


def _some(users: Mapping[str, object]) -> str:
    shown = list(users)[:SHOWN_USERS]
    return ", ".join(shown) + (f" and {len(users) - len(shown)} more" if len(users) > len(shown) else "")


def _words(text: str) -> list[str]:
    """The words in lower case, without the punctuation around them."""
    return [word.strip(".,!?").lower() for word in text.split()]


def _has_stutter(words: Sequence[str]) -> bool:
    return any(first == second for first, second in zip(words, words[1:], strict=False))
