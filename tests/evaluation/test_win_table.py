"""Runs are held against each other by the scores that their answers were given."""

from __future__ import annotations

from typing import Any

from prlhf.evaluation.win_table import format_wins, rates_between
from tests.evaluation.test_report import cells, final_of


def judged_by(judge: str | None) -> dict[str, Any]:
    outcome = {"wins": 1, "ties": 1, "losses": 0, "mean": 0.75}
    return final_of(win_rate=judge and {"judge": judge, "opponent": "reference", **outcome, "per_user": {}})


def answers(*scores: float | None, prompt: Any = "Q", response: str = "x") -> list[dict[str, Any]]:
    rows = [{"user_id": f"P{i}A", "prompt": prompt, "response": response} for i in range(1, len(scores) + 1)]
    return [row if score is None else {**row, "score": score} for row, score in zip(rows, scores, strict=True)]


def test_the_higher_score_wins() -> None:
    finals = {"mine": judged_by("length"), "vanilla": judged_by("length"), "reward model": judged_by(None)}
    rates = rates_between(finals, {"mine": answers(3.0, 0.25, 1.0), "vanilla": answers(2.0, 0.5, 1.0)})
    assert set(rates) == {"mine", "vanilla"}
    mine = rates["mine"]["vanilla"]
    assert [mine[key] for key in ("judge", "wins", "ties", "losses", "mean")] == ["length", 1, 1, 1, 0.5]
    assert mine["per_user"]["P1A"] == {"wins": 1, "ties": 0, "losses": 0, "mean": 1.0}
    assert cells(format_wins(rates))[1:] == [
        ["mine", "reference", "1", "1", "0", "0.750"], ["mine", "vanilla", "1", "1", "1", "0.500"],
        ["vanilla", "reference", "1", "1", "0", "0.750"], ["vanilla", "mine", "1", "1", "1", "0.500"],
    ]


def test_runs_with_other_prompts_or_another_judge_have_no_win_rate_between_them() -> None:
    dialogue = [{"role": "user", "content": "Q"}]
    finals = {name: judged_by("length") for name in ("a", "b", "c")} | {"d": judged_by("rule")}
    samples = {"a": answers(1.0), "b": answers(1.0, 1.0), "c": answers(1.0, prompt=dialogue), "d": answers(1.0)}
    assert {name: list(against) for name, against in rates_between(finals, samples).items()} == {
        name: ["reference"] for name in "abcd"
    }
    assert rates_between({"a": judged_by(None)}, {}) == {} and format_wins({}) == ""


def test_answers_from_before_scores_were_kept_are_judged_by_the_rule() -> None:
    """P1A likes short words, P2A few, P3A warm ones."""
    finals = {"old": judged_by("rule"), "new": judged_by("rule")}
    simple = "What a great thing to ask! A cat can see well in dim light."
    samples = {"old": answers(None, None, None, response=simple), "new": answers(0.0, 1.0, 0.0)}
    rate = rates_between(finals, samples)["old"]["new"]
    assert [rate[key] for key in ("wins", "ties", "losses")] == [2, 1, 0]
