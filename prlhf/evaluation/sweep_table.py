"""The runs of a sweep, settings side by side: each figure as the mean over a setting's seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prlhf.evaluation.report import make_table

SEED = "seed"
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the normal one.
STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
NORMAL = 1.960

FIGURES = {
    "accuracy": "accuracy",
    "worst_user": "worst user",
    "generic": "generic",
    "unseen": "unseen",
    "on_side": "on side",
    "nll_per_token": "NLL/token",
    "seconds": "loop s",
}


def summarize_sweep(
    runs: Sequence[tuple[str, Mapping[str, Any], int, Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """One entry a setting, in order of first appearance; runs that differ in the seed alone share one.

    Args:
        runs: (name, values by dotted key, seed, `eval/final.json`) of each.
    Returns: `settings` (the values but the seed), `runs`, `seeds`, and for each figure that the runs have `mean`,
        `values` by run, and `ci95`: of the mean over seeds (Student's t), or for the accuracy of a single run that
        run's own interval over pairs, or None.
    """
    groups: dict[str, list[tuple[str, Mapping[str, Any], int, Mapping[str, Any]]]] = {}
    for run in runs:
        key = json.dumps({name: value for name, value in run[1].items() if name != SEED})
        groups.setdefault(key, []).append(run)
    return [
        {
            "settings": json.loads(key),
            "runs": [name for name, *_ in group],
            "seeds": [seed for _, _, seed, _ in group],
            **_summarize_figures([final for *_, final in group]),
        }
        for key, group in groups.items()
    ]


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """95% interval of the mean of independent values by Student's t; None for fewer than two."""
    if len(values) < 2:
        return None
    degrees = len(values) - 1
    quantile = STUDENT_T[degrees - 1] if degrees <= len(STUDENT_T) else NORMAL
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return [mean - half, mean + half]


def format_sweep(settings: Sequence[Mapping[str, Any]]) -> str:
    """The table, and what its intervals are."""
    keys = list(dict.fromkeys(key for entry in settings for key in entry["settings"]))
    shown = [name for name in FIGURES if any(name in entry for entry in settings)]
    header = [*keys, "seeds"]
    for name in shown:
        header += [FIGURES[name], "95% interval"] if name == "accuracy" else [FIGURES[name]]
    rows = []
    for entry in settings:
        row = [_text(entry["settings"].get(key, "-")) for key in keys] + [str(len(entry["seeds"]))]
        for name in shown:
            figure = entry.get(name)
            row.append("-" if figure is None else _number(name, figure["mean"]))
            if name == "accuracy":
                row.append(_interval(figure))
        rows.append(row)
    several = any(len(entry["seeds"]) > 1 for entry in settings)
    note = "Intervals: of the mean over seeds (Student's t); of a single run, over its pairs (bootstrap)." if several \
        else "Intervals: over the pairs of each run (bootstrap)."
    return make_table(header, rows) + f"\n\n{note}\n"


def _summarize_figures(finals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures = {}
    for name in FIGURES:
        values = [value for final in finals if (value := _figure(final, name)) is not None]
        if len(values) < len(finals):
            continue  # a mean over some of the runs would not compare
        interval = mean_interval(values)
        if name == "accuracy" and interval is None:
            interval = finals[0]["accuracy"]["seen"]["ci95"]
        figures[name] = {"mean": float(np.mean(values)), "ci95": interval, "values": values}
    return figures


def _figure(final: Mapping[str, Any], name: str) -> float | None:
    blocks, text, on_side = final["accuracy"], final.get("text"), final.get("on_side")
    if name in ("generic", "unseen"):
        return blocks[name] and blocks[name]["mean"]
    if name == "on_side":
        return float(np.mean([user["policy"] for user in on_side.values()])) if on_side else None
    if name == "nll_per_token":
        return text["policy"]["nll_per_token"] if text else None
    if name == "seconds":
        return final["seconds"]
    seen = blocks["seen"]
    return seen and seen["mean" if name == "accuracy" else name]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(name: str, value: float) -> str:
    return f"{value:.0f}" if name == "seconds" else f"{value:.3f}"


def _interval(figure: Mapping[str, Any] | None) -> str:
    """A share does not leave [0, 1], whatever Student's t says of three seeds."""
    if figure is None or figure["ci95"] is None:
        return "-"
    low, high = figure["ci95"]
    return f"{max(low, 0):.3f} to {min(high, 1):.3f}"
