"""Means over seeds and their intervals, from figures made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from prlhf.evaluation.sweep_table import STUDENT_T, format_sweep, mean_interval, summarize_sweep
from tests.evaluation.test_report import cells


def final(mean: float, *, generic: float = 0.5, unseen: float | None = None, **further: Any) -> dict[str, Any]:
    def block(value: float | None) -> dict[str, Any] | None:
        return None if value is None else {"mean": value, "ci95": [value - 0.1, value + 0.1], "worst_user": value / 2}

    blocks = {"seen": block(mean), "generic": block(generic), "unseen": block(unseen)}
    return {"accuracy": blocks, "on_side": None, "text": None, "seconds": 60.4, **further}


def test_the_interval_of_a_mean_is_students() -> None:
    """0.8, 0.9, 1.0: standard deviation 0.1, t of two degrees of freedom 4.303."""
    half = 4.303 * 0.1 / math.sqrt(3)
    assert mean_interval([0.8, 0.9, 1.0]) == pytest.approx([0.9 - half, 0.9 + half])
    assert mean_interval([0.8]) is None
    assert mean_interval([0.5] * 40) == [0.5, 0.5]


def test_the_quantiles_are_those_of_the_distribution() -> None:
    """The density integrated from 0 by Simpson's rule: 47.5% lie below the quantile."""
    for degrees, quantile in enumerate(STUDENT_T, start=1):
        constant = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        count = 4000
        width = quantile / count
        values = [(1 + (i * width) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(count + 1)]
        weights = [1, *([4, 2] * (count // 2))[:-1], 1]
        share = constant * width / 3 * sum(w * v for w, v in zip(weights, values, strict=True))
        assert share == pytest.approx(0.475, abs=5e-5), degrees  # the quantiles have three decimals


def test_runs_that_differ_in_the_seed_alone_share_a_line() -> None:
    runs = [
        ("a1", {"loss.alpha": 0.5, "seed": 1}, 1, final(0.8)),
        ("b1", {"loss.alpha": 1.0, "seed": 1}, 1, final(0.6)),
        ("a2", {"loss.alpha": 0.5, "seed": 2}, 2, final(0.9, generic=0.7)),
    ]
    first, second = summarize_sweep(runs)
    assert (first["settings"], first["runs"], first["seeds"]) == ({"loss.alpha": 0.5}, ["a1", "a2"], [1, 2])
    half = 12.706 * 0.05
    assert first["accuracy"]["mean"] == pytest.approx(0.85)
    assert first["accuracy"]["ci95"] == pytest.approx([0.85 - half, 0.85 + half])
    assert first["generic"]["mean"] == pytest.approx(0.6)
    assert second["accuracy"] == {"mean": 0.6, "ci95": [0.5, 0.7], "values": [0.6]}, "a single run's own interval"
    assert "unseen" not in first and "on_side" not in first

    header, *lines = cells(format_sweep([first, second]))
    assert header == ["loss.alpha", "seeds", "accuracy", "95% interval", "worst user", "generic", "loop s"]
    assert lines == [
        ["0.5", "2", "0.850", "0.215 to 1.000", "0.425", "0.600", "60"],
        ["1.0", "1", "0.600", "0.500 to 0.700", "0.300", "0.500", "60"],
    ]


def test_what_some_runs_of_a_setting_lack_is_left_out() -> None:
    judged = {
        "on_side": {"ann": {"policy": 1.0}, "bob": {"policy": 0.5}}, "text": {"policy": {"nll_per_token": 2.0}},
    }
    runs = [
        ("a1", {"seed": 1}, 1, final(0.8, unseen=0.7, **judged)),
        ("a2", {"seed": 2}, 2, final(0.9, unseen=0.9)),
        ("b", {"user.kind": "cluster"}, 1, final(0.5, **judged)),
    ]
    first, second = summarize_sweep(runs)
    assert first["unseen"]["mean"] == pytest.approx(0.8)
    assert "on_side" not in first
    assert (second["on_side"]["mean"], second["nll_per_token"]["mean"]) == (0.75, 2.0)
    header, *lines = cells(format_sweep([first, second]))
    assert [dict(zip(header, line, strict=True))["user.kind"] for line in lines] == ["-", "cluster"]
    assert [dict(zip(header, line, strict=True))["on side"] for line in lines] == ["-", "0.750"]


def test_without_evaluation_rows_there_is_a_table_all_the_same() -> None:
    blocks = dict.fromkeys(("seen", "generic", "unseen"))
    runs = [("a", {"seed": 1}, 1, {"accuracy": blocks, "seconds": 1.0})]
    assert cells(format_sweep(summarize_sweep(runs))) == [["seeds", "loop s"], ["1", "1"]]
