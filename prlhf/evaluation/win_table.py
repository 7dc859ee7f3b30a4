"""Win rates of runs against each other, from the answers that they left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prlhf.evaluation.judges import RuleJudge
from prlhf.evaluation.report import make_table
from prlhf.evaluation.samples import count_outcomes

Rows = Sequence[Mapping[str, Any]]


def rates_between(finals: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Rows]) -> dict[str, dict[str, Any]]:
    """Run -> opponent -> win rate: "reference", then every other run that answered the same prompts for the same users.

    Args:
        finals: run -> `eval/final.json`.
        samples: run -> rows of `samples/policy.jsonl`; of runs without a win rate they are not looked at, and a run
            without rows is held against the reference alone.
    """
    own = {name: final["win_rate"] for name, final in finals.items() if final.get("win_rate")}
    asked = {name: [(row["user_id"], json.dumps(row["prompt"])) for row in samples[name]]
             for name in own if samples.get(name)}
    rates = {name: {"reference": rate} for name, rate in own.items()}
    for name, rate in own.items():
        for other in asked:
            if name in asked and other != name and asked[other] == asked[name] and own[other]["judge"] == rate["judge"]:
                rates[name][other] = _rates(samples[name], samples[other], judge=rate["judge"], opponent=other)
    return rates


def format_wins(rates: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A line for each run and opponent; empty without any."""
    rows = [
        [name, opponent, *(str(rate[key]) for key in ("wins", "ties", "losses")), f"{rate['mean']:.3f}"]
        for name, against in rates.items()
        for opponent, rate in against.items()
    ]
    return make_table(["answers of", "against", "wins", "ties", "losses", "mean (tie = 1/2)"], rows) if rows else ""


def _rates(ours: Rows, theirs: Rows, *, judge: str, opponent: str) -> dict[str, Any]:
    scores = zip(ours, _scores(ours), _scores(theirs), strict=True)
    outcomes = [(row["user_id"], int(mine > other) - int(mine < other)) for row, mine, other in scores]
    return count_outcomes(outcomes, judge=judge, opponent=opponent)


def _scores(rows: Rows) -> list[float]:
    """Those that were kept; where none were, they are the rule judge's of the six users of `builtin:psoups`."""
    if all("score" in row for row in rows):
        return [row["score"] for row in rows]
    judge = RuleJudge()
    return [judge.serves(row["response"], row["user_id"]) for row in rows]
