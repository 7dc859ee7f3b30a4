"""`builtin:psoups`: six users with opposed tastes on three axes, who judge the same pairs of responses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from prlhf.data.records import PreferenceData, PreferenceRow
from prlhf.data.world.authored import Tone, load_heldout_topics, load_tone, load_training_topics
from prlhf.data.world.render import (
    AXES,
    STYLES,
    Request,
    Style,
    Tones,
    draw_general_prompt,
    make_requests,
    render,
    render_general,
)

TRAIN_PAIRS = 400  # an axis; each pair is judged by the two users of its axis
GENERAL_PAIRS = 400  # an axis, in training, about topics without known facts
DEV_PAIRS = 42
EVAL_PAIRS = 200
MAX_LENGTH_GAP = 0.5  # characters between the mean lengths of the two tones' phrases
MAX_LENGTH_LEAD = 0.05  # how much more often one tone's phrase is the longer of two than the shorter
OPENERS, CLOSERS = 12, 8  # of each tone in one world; the other phrases are in the pretraining text alone


@dataclass(frozen=True)
class Taste:
    """What a user prefers: one side of one axis (the value of that axis' field of Style).

    Args:
        wish: the taste in words, one of the sentences that ask for that side in the pretraining text.
    """

    axis: str
    side: bool
    wish: str


TASTES = {
    "P1A": Taste("register", False, "Use short words."),
    "P1B": Taste("register", True, "Use the technical terms."),
    "P2A": Taste("length", False, "Keep it short."),
    "P2B": Taste("length", True, "Give some background too."),
    "P3A": Taste("tone", True, "Be warm and friendly."),
    "P3B": Taste("tone", False, "Act unfriendly."),
}


def sides_in_words(words: str) -> dict[str, bool]:
    """Axis -> the side that a text asks for in the words of a taste."""
    return {taste.axis: taste.side for taste in TASTES.values() if taste.wish in words}


def build_psoups(seed: int) -> PreferenceData:
    """The preference data of the six users; every prompt belongs to one pair, every pair to two opposed users.

    train and dev: prompts about the training topics, none in both. Half of train is about topics without known
    facts, answered in general: a model that is trained on facts alone invents some for every topic that it does not
    know. eval_seen: prompts about the held-out topics, which neither the training pairs nor the pretraining text
    mention. eval_unseen is empty: there are no further users.

    Args:
        seed: draws prompts, styles, phrases and facts; the held-out topics are the same for every seed.
    """
    rng = random.Random(f"psoups {seed}")
    tones = draw_phrases(rng)
    training = make_requests(load_training_topics())
    heldout = make_requests(load_heldout_topics())
    rng.shuffle(training)
    rng.shuffle(heldout)
    num_train, num_dev, num_eval = (len(AXES) * pairs for pairs in (TRAIN_PAIRS, DEV_PAIRS, EVAL_PAIRS))
    return PreferenceData(
        train=[
            *_make_rows("train", training[:num_train], tones, rng),
            *_make_general_rows("general", len(AXES) * GENERAL_PAIRS, tones, rng),
        ],
        dev=_make_rows("dev", training[num_train : num_train + num_dev], tones, rng),
        eval_seen=_make_rows("eval", heldout[:num_eval], tones, rng),
        eval_unseen=[],
        source="builtin:psoups",
        preferences={user_id: taste.wish for user_id, taste in TASTES.items()},
    )


def draw_phrases(rng: random.Random) -> Tones:
    """A world's phrases of either tone, drawn again until their lengths do not give the tone away."""
    while True:
        drawn: dict[bool, Tone] = {}
        for friendly in (False, True):
            tone = load_tone(friendly=friendly)
            openers, closers = rng.sample(tone.openers, OPENERS), rng.sample(tone.closers, CLOSERS)
            drawn[friendly] = replace(tone, openers=tuple(openers), closers=tuple(closers))
        lengths = [[list(map(len, getattr(drawn[side], kind))) for side in drawn] for kind in ("openers", "closers")]
        if all(abs(mean(a) - mean(b)) <= MAX_LENGTH_GAP and _length_lead(a, b) <= MAX_LENGTH_LEAD for a, b in lengths):
            return drawn


def _length_lead(first: Sequence[int], second: Sequence[int]) -> float:
    """How far apart the shares of pairs are in which the first or the second is longer."""
    return abs(mean((a > b) - (a < b) for a in first for b in second))


def _make_rows(split: str, requests: Sequence[Request], tones: Tones, rng: random.Random) -> list[PreferenceRow]:
    """A pair for each request, the axes in turn, and the judgements of its two users."""
    rows = []
    for number, request in enumerate(requests):
        axis, styles = _draw_styles(number, rng)
        responses = {side: render(request, style, rng, tones) for side, style in styles.items()}
        rows += _judge(f"{split}-{number:04d}", axis, request.prompt, responses)
    return rows


def _make_general_rows(split: str, num_pairs: int, tones: Tones, rng: random.Random) -> list[PreferenceRow]:
    """The same about topics without known facts, no prompt twice; both responses of a pair have the same content."""
    prompts: dict[str, None] = {}
    while len(prompts) < num_pairs:
        prompts[draw_general_prompt(rng)] = None
    rows = []
    for number, prompt in enumerate(prompts):
        axis, styles = _draw_styles(number, rng)
        content = rng.random()
        responses = {side: render_general(style, random.Random(content), tones) for side, style in styles.items()}
        rows += _judge(f"{split}-{number:04d}", axis, prompt, responses)
    return rows


def _draw_styles(number: int, rng: random.Random) -> tuple[str, dict[bool, Style]]:
    """The axis of a pair, the axes taking turns, and the styles of its two sides, alike on the other axes."""
    axis = list(AXES)[number % len(AXES)]
    style = rng.choice(STYLES)
    return axis, {side: replace(style, **{AXES[axis]: side}) for side in (False, True)}


def _judge(pair_id: str, axis: str, prompt: str, responses: dict[bool, str]) -> list[PreferenceRow]:
    """The judgements of the two users of an axis."""
    return [
        PreferenceRow(pair_id, user_id, prompt, responses[taste.side], responses[not taste.side])
        for user_id, taste in TASTES.items()
        if taste.axis == axis
    ]
