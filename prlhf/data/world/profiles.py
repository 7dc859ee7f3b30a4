"""What the people of `builtin:prism` write about themselves: first-person sentences from which a taste follows."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from prlhf.data.world.authored import WORLD_DIR
from prlhf.data.world.render import AXES, Style

AGES = (18, 82)
ASIDE_CHANCE = 0.5
STATED_SHARE = 0.5  # of the remarks on an axis, those that name the taste; the others let it be seen


@dataclass(frozen=True)
class Remark:
    """One sentence about oneself.

    Args:
        ages: youngest and oldest age at which it can be said.
        is_work: it says what the person does for a living.
    """

    text: str
    ages: tuple[int, int] = AGES
    is_work: bool = False


@dataclass(frozen=True)
class Profiles:
    """The authored sentences.

    Args:
        openings: shapes with {age} and {place}.
        lives: what people do, which says nothing about their taste.
        schooling: likewise; said by those who name their taste for a register, which school tells of the others.
        asides: likewise, about anything else.
        stated: (axis, side) -> remarks that name the taste.
        shown: (axis, side) -> remarks from which it follows.
        follow_ups: shapes with {question} in which one goes on asking.
    """

    openings: tuple[str, ...]
    places: tuple[str, ...]
    lives: tuple[Remark, ...]
    schooling: tuple[Remark, ...]
    asides: tuple[Remark, ...]
    stated: Mapping[tuple[str, bool], tuple[Remark, ...]]
    shown: Mapping[tuple[str, bool], tuple[Remark, ...]]
    follow_ups: tuple[str, ...]


@cache
def load_profiles() -> Profiles:
    """The authored sentences of `profiles.json`."""
    data = json.loads((WORLD_DIR / "profiles.json").read_text(encoding="utf-8"))
    sides = [(axis, side) for axis in AXES for side in (False, True)]
    stated, shown = (
        {(axis, side): _remarks(data["axes"][axis][str(side)][kind]) for axis, side in sides}
        for kind in ("stated", "shown")
    )
    lives = tuple(Remark(remark.text, remark.ages, is_work=True) for remark in _remarks(data["lives"]))
    return Profiles(
        openings=tuple(data["openings"]),
        places=tuple(data["places"]),
        lives=lives,
        schooling=_remarks(data["schooling"]),
        asides=_remarks(data["asides"]),
        stated=stated,
        shown=shown,
        follow_ups=tuple(data["follow_ups"]),
    )


def draw_profile(taste: Style, rng: random.Random) -> str:
    """A person with this taste in their own words: age and home, work, schooling, a remark on each axis, an aside.

    Each side of the taste is either named or left to be seen.
    """
    profiles = load_profiles()
    remarks = _draw_remarks(profiles, taste, rng)
    while _common_ages(remarks) is None:
        remarks = _draw_remarks(profiles, taste, rng)
    opening = rng.choice(profiles.openings).format(
        age=rng.randint(*_common_ages(remarks) or AGES), place=rng.choice(profiles.places)
    )
    work = [remark.text for remark in remarks if remark.is_work]
    others = [remark.text for remark in remarks if not remark.is_work]
    rng.shuffle(others)
    return " ".join([opening, *work, *others])


def _draw_remarks(profiles: Profiles, taste: Style, rng: random.Random) -> list[Remark]:
    remarks = []
    for axis, name in AXES.items():
        stated = rng.random() < STATED_SHARE
        remarks.append(rng.choice((profiles.stated if stated else profiles.shown)[axis, getattr(taste, name)]))
        if stated and axis == "register":
            remarks.append(rng.choice(profiles.schooling))
    if not any(remark.is_work for remark in remarks):
        remarks.append(rng.choice(profiles.lives))
    if rng.random() < ASIDE_CHANCE:
        remarks.append(rng.choice(profiles.asides))
    return remarks


def _common_ages(remarks: Sequence[Remark]) -> tuple[int, int] | None:
    """The ages at which all of them can be said, or None."""
    youngest, oldest = max(remark.ages[0] for remark in remarks), min(remark.ages[1] for remark in remarks)
    return (youngest, oldest) if youngest <= oldest else None


def _remarks(entries: Sequence[str | dict[str, Any]]) -> tuple[Remark, ...]:
    """A bare string can be said at any age."""
    return tuple(
        Remark(entry)
        if isinstance(entry, str)
        else Remark(entry["text"], tuple(entry.get("ages", AGES)), entry.get("work", False))
        for entry in entries
    )
