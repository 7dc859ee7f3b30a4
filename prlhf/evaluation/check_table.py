"""What an accuracy is held against: baselines without training, controls, and what the users' tastes cost, by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prlhf.evaluation.report import CEILING, make_table

MAX_WIDTH = 120  # characters; more runs go on in a table below
TITLE = "baselines and checks"
PARTS = ("seen", "unseen")
Value = float | tuple[int, ...]  # a figure, or numbers of rows that share prompt, pair, response, of how many
Finals = Mapping[str, Mapping[str, Any]]
Wins = Mapping[str, Mapping[str, Mapping[str, Any]]]


def check_rows(finals: Finals, wins: Wins | None = None) -> list[tuple[str, dict[str, str]]]:
    """(label, run -> figure) of everything that at least one of the runs has; "-" in the others.

    Args:
        finals: run -> `eval/final.json`.
        wins: run -> opponent -> win rate; None: those against the reference that the evaluations hold.
    """
    return [(label, {name: _text(values.get(name)) for name in finals}) for label, values in _values(finals, wins)]


def format_checks(finals: Finals, wins: Wins | None = None) -> str:
    """The rows as tables of a column a run, as many runs in one as fit in 120 characters; empty without rows."""
    rows = check_rows(finals, wins)
    if not rows:
        return ""
    tables: list[str] = []
    shown: list[str] = []
    for name in finals:
        if shown and len(_table(rows, [*shown, name]).split("\n", 1)[0]) > MAX_WIDTH:
            tables.append(_table(rows, shown))
            shown = []
        shown.append(name)
    return "\n\n".join([*tables, _table(rows, shown)])


def format_check_spans(finals: Finals) -> str:
    """The lowest and the highest figure of all runs, for sweeps, which have more runs than columns."""
    rows = []
    for label, by_run in _values(finals, None):
        values = list(by_run.values())
        rows.append([label, _text(_fold(min, values)), _text(_fold(max, values)), str(len(values))])
    return make_table([TITLE, "lowest", "highest", "runs"], rows) if rows else ""


def _table(rows: Sequence[tuple[str, Mapping[str, str]]], names: Sequence[str]) -> str:
    return make_table([TITLE, *names], [[label, *(figures[name] for name in names)] for label, figures in rows])


def _values(finals: Finals, wins: Wins | None) -> list[tuple[str, dict[str, Value]]]:
    """In the order of the table, what at least one run has."""
    by_label: dict[str, dict[str, Value]] = {}
    for name, final in finals.items():
        rates = {"reference": final.get("win_rate")} if wins is None else wins.get(name, {})
        for label, value in {**_baselines(final), **_controls(final), **_comparisons(final, finals, rates)}.items():
            values = by_label.setdefault(label, {})
            if value is not None:
                values[name] = value
    return [(label, values) for label, values in by_label.items() if values]


def _baselines(final: Mapping[str, Any]) -> dict[str, Value | None]:
    baselines, majority = final.get("baselines") or {}, final.get("majority") or {}
    rules = {"length alone": baselines.get("length_only"), "format alone": baselines.get("format_only")}
    return {
        **{f"{label}, {part} users": (rule or {}).get(part) for label, rule in rules.items() for part in PARTS},
        "reference told the user's wish": _mean(baselines.get("prompted")),
        "reference shown the user's pairs": _mean(baselines.get("few_shot")),
        **{f"one preference for all, {part} users": majority.get(part) for part in PARTS},
        CEILING: final.get("ceiling"),
    }


def _controls(final: Mapping[str, Any]) -> dict[str, Value | None]:
    leaks, apart = final.get("leaks") or {}, (final.get("slices") or {}).get("length_gap_20") or {}
    shuffled, overlap = leaks.get("shuffled_users") or {}, leaks.get("overlap") or {}
    return {
        "users drawn anew": shuffled.get("mean"),
        "users drawn anew, expected of a perfect model": _mean(shuffled.get("expected")),
        "lengths 20% apart, seen users": _mean(apart.get("seen")),
        "lengths 20% apart, generic user": _mean(apart.get("generic")),
        "lengths 20% apart, unseen users": _mean(apart.get("unseen")),
        **{f"{part} rows with a training prompt/pair/response": _shared(overlap.get(f"eval_{part}")) for part in PARTS},
    }


def _comparisons(
    final: Mapping[str, Any], finals: Finals, rates: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, Value | None]:
    """What is seen beside the reference and beside vanilla, of several vanilla runs their mean."""
    generic, neutral = _mean(final["accuracy"].get("generic")), (final.get("tax") or {}).get("nll_per_token", {})
    vanilla = _vanilla_runs(finals, final)
    behind = [] if generic is None else [generic - finals[name]["accuracy"]["seen"]["mean"] for name in vanilla]
    return {
        "answers against the reference's (a tie is half)": _mean(rates.get("reference")),
        "answers against the vanilla run's": _average([rate["mean"] for name in vanilla if (rate := rates.get(name))]),
        "generic user's accuracy less the vanilla run's": _average(behind),
        "NLL/token of neutral text: reference": neutral.get("reference"),
        "the same, generic user": neutral.get("generic"),
        "the same, mean of users": neutral.get("users_mean"),
    }


def _vanilla_runs(finals: Finals, final: Mapping[str, Any]) -> list[str]:
    """Runs without users on the data of a run that has some."""
    if final["user_model"] == "none":
        return []
    return [
        name
        for name, other in finals.items()
        if other["user_model"] == "none"
        and other["accuracy"]["seen"]
        and (other["data"]["source"], other["data"]["seed"]) == (final["data"]["source"], final["data"]["seed"])
    ]


def _mean(block: Mapping[str, Any] | None) -> float | None:
    return block["mean"] if block else None


def _shared(counts: Mapping[str, int] | None) -> Value | None:
    """None where there are no rows, or no training rows are known."""
    if not counts or not counts["rows"] or "prompt" not in counts:
        return None
    return counts["prompt"], counts["pair"], counts["response"], counts["rows"]


def _average(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _fold(function: Any, values: Sequence[Value]) -> Value:
    """The lowest or highest figure; of numbers of rows each by itself."""
    if isinstance(values[0], tuple):
        return tuple(function(column) for column in zip(*values, strict=True))
    return function(values)


def _text(value: Value | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        *shared, rows = value
        return f"{'/'.join(map(str, shared))} of {rows}"
    return f"{value:.3f}"
