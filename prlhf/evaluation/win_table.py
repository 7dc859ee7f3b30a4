"""Win rates of runs against each other, from the answers that they left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prlhf.data.records import Message
from prlhf.evaluation.judges import RuleJudge
from prlhf.evaluation.report import make_table
from prlhf.evaluation.samples import Sample, win_rates


def rates_between(
    finals: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Run -> opponent -> win rate: "reference", then every other run that answered the same prompts for the same users.

    Args:
        finals: run -> `eval/final.json`.
        samples: run -> rows of `samples/policy.jsonl`; of runs without a win rate they are not looked at.
    """
    judged = {name: list(map(_sample, rows)) for name, rows in samples.items() if finals[name].get("win_rate")}
    asked = {name: [(sample.user_id, sample.prompt) for sample in group] for name, group in judged.items()}
    judge = RuleJudge() if judged else None
    rates = {name: {"reference": finals[name]["win_rate"]} for name in judged}
    for name, ours in judged.items():
        for other, theirs in judged.items():
            if judge and other != name and asked[other] == asked[name]:
                rates[name][other] = win_rates(ours, theirs, judge, opponent=other)
    return rates


def format_wins(rates: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A line for each run and opponent; empty without any."""
    rows = [
        [name, opponent, *(str(rate[key]) for key in ("wins", "ties", "losses")), f"{rate['mean']:.3f}"]
        for name, against in rates.items()
        for opponent, rate in against.items()
    ]
    return make_table(["answers of", "against", "wins", "ties", "losses", "mean (tie = 1/2)"], rows) if rows else ""


def _sample(record: Mapping[str, Any]) -> Sample:
    """With what a judge reads."""
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        prompt = tuple(Message(**turn) for turn in prompt)
    return Sample(record["user_id"], prompt, record["response"], nll_per_token=float("nan"), num_tokens=0)
