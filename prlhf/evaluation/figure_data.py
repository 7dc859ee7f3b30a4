"""The numbers that the figures of a report draw; nothing here draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from prlhf.evaluation.run_files import RunFiles
from prlhf.evaluation.sweep_table import NORMAL, mean_interval

SMOOTHED_SHARE = 40  # a curve is averaged over a fortieth of its steps


class Estimate(NamedTuple):
    """A figure with its 95% interval, over `size` rows or samples."""

    value: float
    low: float
    high: float
    size: int


@dataclass(frozen=True)
class UserFigures:
    """One figure of each user, in the order of the evaluation."""

    label: str
    by_user: Mapping[str, Estimate]


@dataclass(frozen=True)
class Level:
    """A figure that belongs to no user; `series` is the place of the one it goes with, None: of none."""

    label: str
    estimate: Estimate
    series: int | None


@dataclass(frozen=True)
class Curve:
    """Values over steps; the bounds are an interval, or None."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    bounds: Sequence[tuple[float, float]] | None = None


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share of `count` rows; it stays inside [0, 1] and has a width at 0 and 1.

    Source: Wilson 1927, JASA 22(158).
    """
    z2 = NORMAL**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = NORMAL / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    # At 0 and 1 a bound is the share itself, but for rounding.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def accuracy_by_user(run: RunFiles, *, generic: bool = False, label: str | None = None) -> UserFigures:
    """Accuracy of each seen user with its own embedding, or on the same rows as the generic user."""
    name = "generic_accuracy" if generic else "accuracy"
    per_user = (run.final or {}).get("per_user", {})
    return UserFigures(
        label or run.name,
        {
            user: Estimate(figures[name], *wilson_interval(figures[name], figures["num_rows"]), figures["num_rows"])
            for user, figures in per_user.items()
        },
    )


def words_by_user(samples: Sequence[Mapping[str, Any]], label: str) -> UserFigures:
    """Mean words of the answers to each user, with Student's interval."""
    words: dict[str, list[float]] = {}
    for sample in samples:
        words.setdefault(sample["user_id"], []).append(_num_words(sample))
    return UserFigures(label, {user: _mean_estimate(counts) for user, counts in words.items()})


def words_of_all(samples: Sequence[Mapping[str, Any]], label: str, *, series: int | None) -> Level:
    """Mean words of all answers together, with Student's interval."""
    return Level(label, _mean_estimate([_num_words(sample) for sample in samples]), series)


def _num_words(sample: Mapping[str, Any]) -> float:
    return float(len(sample["response"].split()))


def _mean_estimate(values: Sequence[float]) -> Estimate:
    mean = float(np.mean(values))
    low, high = mean_interval(values) or (mean, mean)
    return Estimate(mean, max(0.0, low), high, len(values))


def worst_users(run: RunFiles, count: int) -> list[tuple[str, Estimate, Estimate]]:
    """The users with the lowest accuracy, the worst first: id, own and generic accuracy."""
    own, generic = accuracy_by_user(run).by_user, accuracy_by_user(run, generic=True).by_user
    order = sorted(own, key=lambda user: own[user].value)
    return [(user, own[user], generic[user]) for user in order[:count]]


def training_curve(run: RunFiles, name: str, *, label: str | None = None, smooth: bool = True) -> Curve | None:
    """One of the figures of metrics.jsonl over steps; None when the run has none of that name."""
    points = [(line["step"], line[name]) for line in run.metrics if line.get(name) is not None]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    window = max(1, len(values) // SMOOTHED_SHARE) if smooth else 1
    return Curve(run.name if label is None else label, steps, running_mean(values, window))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the values within `window` // 2 places of each; fewer at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    starts = np.maximum(np.arange(len(values)) - half, 0)
    ends = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def accuracy_over_steps(run: RunFiles, block: str, *, label: str | None = None) -> Curve | None:
    """Accuracy on the dev rows during training, with its interval; None without such evaluations."""
    blocks = [(evaluation["step"], evaluation["accuracy"].get(block)) for evaluation in run.evaluations]
    points = [(step, figures) for step, figures in blocks if figures]
    if not points:
        return None
    return Curve(
        label or run.name,
        [step for step, _ in points],
        [figures["mean"] for _, figures in points],
        [(figures["ci95"][0], figures["ci95"][1]) for _, figures in points],
    )


def answers_side_by_side(run: RunFiles, *, num_prompts: int, num_users: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """The first prompts, each with the reference's answer and the first users' answers: (prompt, [(who, answer)])."""
    answers: dict[str, dict[str, str]] = {}
    for sample in run.samples.get("policy", []):
        answers.setdefault(_prompt_text(sample["prompt"]), {})[sample["user_id"]] = sample["response"]
    reference: dict[str, str] = {}
    for sample in run.samples.get("reference", []):
        reference.setdefault(_prompt_text(sample["prompt"]), sample["response"])
    shown = []
    for prompt, by_user in list(answers.items())[:num_prompts]:
        first = [("the reference", reference[prompt])] if prompt in reference else []
        shown.append((prompt, [*first, *list(by_user.items())[:num_users]]))
    return shown


def _prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A dialogue as its turns, a line each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
