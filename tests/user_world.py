"""Users who like short or long answers and say so, each in words of their own; a third is never seen in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_run import preference_record, write_jsonl

THINGS = ["tea", "rain", "chess", "the moon", "bread", "old maps", "a clock", "bees", "snow", "ink", "a kite", "salt"]
EVAL_THINGS = ["owls", "wool", "a bell", "gold", "the tide", "figs", "a lamp", "moss", "glue", "tin"]
NUM_SEEN, NUM_UNSEEN = 24, 12
ASIDES = ["I sell shoes.", "I live near a lake.", "I sing in a choir.", "I have two cats.", "I cook at home."]
SHORT = ["Please be brief.", "I like it brief.", "Be brief with me."]
LONG = ["Please tell me all.", "I like to hear all.", "I want it all."]


def write_user_world(directory: Path) -> Path:
    """A prepared directory; `users.json` holds what each user says, the tastes are opposed and evenly spread."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    users = {f"{'s' if i < NUM_SEEN else 'u'}{i}": i % 2 == 0 for i in range(NUM_SEEN + NUM_UNSEEN)}
    texts = {user: _text(rng, prefers_short=short) for user, short in users.items()}
    seen = [user for user in users if user.startswith("s")]
    unseen = [user for user in users if user.startswith("u")]
    write_jsonl(directory / "train.jsonl", _rows(rng, users, seen, THINGS, 8))
    write_jsonl(directory / "eval_seen.jsonl", _rows(rng, users, seen, EVAL_THINGS, 3))
    write_jsonl(directory / "eval_unseen.jsonl", _rows(rng, users, unseen, EVAL_THINGS, 9))
    declared = {
        user: {"user_text": text, "split": "seen" if user in seen else "unseen"} for user, text in texts.items()
    }
    (directory / "users.json").write_text(json.dumps(declared), encoding="utf-8")
    return directory


def _text(rng: np.random.Generator, *, prefers_short: bool) -> str:
    parts = [rng.choice(SHORT if prefers_short else LONG), *rng.choice(ASIDES, 2, replace=False)]
    return " ".join(rng.permutation(parts))


def _rows(
    rng: np.random.Generator, users: dict[str, bool], members: list[str], things: list[str], count: int
) -> list[dict[str, Any]]:
    """Each member's judgments of `count` of the things."""
    return [
        preference_record(thing, user, prefers_short=users[user])
        for user in members
        for thing in rng.choice(things, count, replace=False)
    ]
