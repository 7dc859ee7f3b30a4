"""Posts that tell of a quandary, and summaries of them in one to four sentences."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from prlhf.data.tldr import make_prompt
from prlhf.data.world.authored import Situation, load_posts

OPENER_SHARE, CLOSER_SHARE = 0.25, 0.25
RESERVED_SHARE = 0.25  # of all posts that can be written, for evaluation alone
CLOSE = 0.8  # the shorter of two summaries of equally many sentences has more than this share of the characters
# What a summary consists of, by its number of sentences: a gist, points of the post by number, its question.
GIST, QUESTION = "gist", "question"
PLANS: dict[int, tuple[tuple[str | int, ...], ...]] = {
    1: ((GIST,), (1,)),
    2: ((GIST, QUESTION), (1, QUESTION), (0, 1), (1, 2)),
    3: ((0, 1, 2), (0, 1, QUESTION), (1, 2, QUESTION)),
    4: ((0, 1, 2, QUESTION),),
}


@dataclass(frozen=True)
class Post:
    """A post as a prompt, and what summaries of it are made of.

    Args:
        gists: the whole in one sentence; any of them.
        points: of the post, each as a summary tells it.
        question: likewise.
    """

    prompt: str
    gists: tuple[str, ...]
    points: tuple[str, ...]
    question: str

    def summarize(self, num_sentences: int, rng: random.Random) -> str:
        """One of the summaries with this many sentences, 1 to 4."""
        sentences: dict[str | int, str] = {GIST: rng.choice(self.gists), QUESTION: self.question}
        sentences.update(enumerate(self.points))
        return " ".join(sentences[part] for part in rng.choice(PLANS[num_sentences]))

    def summary_pair(self, rng: random.Random) -> tuple[str, str]:
        """Two summaries of different lengths: one of more sentences is a fifth longer or more."""
        while True:
            counts = rng.choices(list(PLANS), k=2)
            pair = self.summarize(counts[0], rng), self.summarize(counts[1], rng)
            lengths = [len(summary) for summary in pair]
            close = min(lengths) > CLOSE * max(lengths)
            agree = (lengths[0] > lengths[1]) == (counts[0] > counts[1])
            if lengths[0] != lengths[1] and (close if counts[0] == counts[1] else agree and not close):
                return pair


def draw_posts(situations: Sequence[Situation], count: int, rng: random.Random, *, reserved: bool) -> list[Post]:
    """Posts about the situations in turn, none twice.

    Args:
        reserved: whether they are of those that are for evaluation alone, whatever the seed.
    """
    posts: dict[str, Post] = {}
    while len(posts) < count:
        post = _draw_post(situations[len(posts) % len(situations)], rng)
        if is_reserved(post.prompt) == reserved:
            posts.setdefault(post.prompt, post)
    return list(posts.values())


def is_reserved(prompt: str) -> bool:
    """Whether a post is for evaluation alone: a share of all posts, by hash."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 256 * RESERVED_SHARE


def _draw_post(situation: Situation, rng: random.Random) -> Post:
    """The first two points are always told, and one of the others."""
    fills = {name: rng.choice(values) for name, values in situation.slots.items()}
    told = [*situation.points[:2], rng.choice(situation.points[2:])]
    sentences = [*(text for text, _ in told), situation.question[0]]
    if rng.random() < OPENER_SHARE:
        sentences.insert(0, rng.choice(load_posts().openers))
    if rng.random() < CLOSER_SHARE:
        sentences.append(rng.choice(load_posts().closers))

    def fill(*texts: str) -> tuple[str, ...]:
        filled = (text.format(**fills) for text in texts)
        return tuple(text[0].upper() + text[1:] for text in filled)

    (title,) = fill(rng.choice(situation.titles))
    points, (question,) = fill(*(summary for _, summary in told)), fill(situation.question[1])
    return Post(make_prompt(title, " ".join(fill(*sentences))), fill(*situation.gists), points, question)
