"""A rule judge for `builtin:psoups`: certain of all that the world can render, cautious about the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from prlhf.data.load import BUILTIN_PSOUPS
from prlhf.data.world.authored import load_general_text, load_tone, load_topics
from prlhf.data.world.psoups import TASTES
from prlhf.data.world.render import AXES
from prlhf.errors import DataError

# By axis: a score up to the first number is the side that Style calls False (simple, concise, unfriendly), one from the
# second on the other (expert, informative, friendly); between them the judge is undecided. The world's own responses
# score register <= 4.44 or >= 4.87, length <= 21 or >= 34, tone <= -1 or >= 1.
BANDS = {"register": (4.5, 4.8), "length": (24, 30), "tone": (-1, 1)}
MIN_SENTENCE_WORDS = 3


class RuleJudge:
    """Tells the side of a text on each axis, by counting letters, words, and warm and cold words."""

    def __init__(self) -> None:
        self._warm = load_tone(friendly=True).words
        self._cold = load_tone(friendly=False).words
        tones = [load_tone(friendly=friendly) for friendly in (True, False)]
        sentences = [sentence for tone in tones for sentence in (*tone.openers, *tone.closers)]
        sentences += [sentence for topic in load_topics() for sentence in topic.sentences()]
        general = load_general_text()
        for wording in (*general.answers, *general.backgrounds):
            sentences += [wording.simple, wording.expert]
        self._vocabulary = {word for sentence in sentences for word in _words(sentence)}

    @staticmethod
    def knows(world: str | None, users: Iterable[str]) -> bool:
        """Whether these are users of the built-in world that the rules are of."""
        return world == BUILTIN_PSOUPS and set(users) <= TASTES.keys()

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

    def on_side(self, text: str, user_id: str) -> bool:
        """Whether the text is certainly on the side that the user prefers.

        Raises: DataError: the user is not one of the six.
        """
        if user_id not in TASTES:
            raise DataError(f"user {user_id!r}: the rule judge knows {', '.join(TASTES)}")
        taste = TASTES[user_id]
        return self.side(text, taste.axis) == (1 if taste.side else -1)

    def prefers(self, text_a: str, text_b: str, user_id: str) -> int:
        """1 if only the first text is on the user's side, -1 if only the second is, 0 (a tie) otherwise."""
        return int(self.on_side(text_a, user_id)) - int(self.on_side(text_b, user_id))

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


def _words(text: str) -> list[str]:
    """The words in lower case, without the punctuation around them."""
    return [word.strip(".,!?").lower() for word in text.split()]


def _has_stutter(words: Sequence[str]) -> bool:
    return any(first == second for first, second in zip(words, words[1:], strict=False))
