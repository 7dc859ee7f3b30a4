"""Baselines, controls and costs stand beside each other, run by run, and nothing that no run has."""

from __future__ import annotations

from typing import Any

from prlhf.evaluation.check_table import MAX_WIDTH, check_rows, format_check_spans, format_checks
from tests.evaluation.test_report import block, cells, final_of, judged, tax_of


def checked(**changes: Any) -> dict[str, Any]:
    return final_of(
        **{
            "baselines": {
                "length_only": {"seen": 0.7, "unseen": None}, "format_only": {"seen": 0.8, "unseen": 0.6},
                "prompted": block(0.55), "few_shot": None,
            },
            "majority": {"seen": 0.685, "unseen": 0.636},
            "ceiling": 0.9,
            "slices": {"length_gap_20": {"seen": block(0.875), "generic": block(0.5), "unseen": None}},
            "leaks": {
                "overlap": {
                    "eval_seen": {"rows": 8, "prompt": 1, "pair": 0, "response": 3}, "eval_unseen": {"rows": 0},
                },
                "shuffled_users": {"mean": 0.5123, "num_rows": 9, "expected": {"mean": 0.58, "known": 1.0}},
            },
            **changes,
        }
    )  # fmt: skip


def test_what_a_run_has_is_a_row_and_the_rest_is_left_out() -> None:
    assert check_rows({"mine": checked(tax=tax_of(1, 1.25, 1.5), win_rate=judged()["win_rate"])}) == [
        (label, {"mine": figure})
        for label, figure in {
            "length alone, seen users": "0.700",
            "format alone, seen users": "0.800",
            "format alone, unseen users": "0.600",
            "reference told the user's wish": "0.550",
            "one preference for all, seen users": "0.685",
            "one preference for all, unseen users": "0.636",
            "best possible under the labels' noise": "0.900",
            "users drawn anew": "0.512",
            "users drawn anew, expected of a perfect model": "0.580",
            "lengths 20% apart, seen users": "0.875",
            "lengths 20% apart, generic user": "0.500",
            "seen rows with a training prompt/pair/response": "1/0/3 of 8",
            "answers against the reference's (a tie is half)": "0.688",
            "NLL/token of neutral text: reference": "1.000",
            "the same, generic user": "1.250",
            "the same, mean of users": "1.500",
        }.items()
    ]
    assert check_rows({"old": final_of()}) == [] and format_checks({"old": final_of()}) == ""
    assert format_check_spans({"old": final_of()}) == ""


def test_runs_are_columns_and_what_one_of_them_lacks_is_a_dash() -> None:
    rows = cells(format_checks({"mine": checked(), "other": final_of(ceiling=0.8)}))
    assert rows[0] == ["baselines and checks", "mine", "other"]
    assert ["best possible under the labels' noise", "0.900", "0.800"] in rows
    assert ["length alone, seen users", "0.700", "-"] in rows


def test_vanilla_runs_on_the_same_data_are_what_a_run_with_users_is_held_against() -> None:
    vanilla = [final_of(user_model="none", accuracy={**final_of()["accuracy"], "seen": block(x)}) for x in (0.6, 0.7)]
    elsewhere = final_of(user_model="none", data={"source": "elsewhere", "seed": 0})
    finals = {"mine": final_of(), "v1": vanilla[0], "v2": vanilla[1], "v3": elsewhere}
    rates = {"mine": {"reference": block(0.9), "v1": block(0.75), "v2": block(0.5), "v3": block(0.25)}, "v1": {}}
    rows = dict(check_rows(finals, rates))
    dashes = {"v1": "-", "v2": "-", "v3": "-"}
    assert rows["generic user's accuracy less the vanilla run's"] == {"mine": "-0.150", **dashes}
    assert rows["answers against the vanilla run's"] == {"mine": "0.625", **dashes}
    assert rows["answers against the reference's (a tie is half)"] == {"mine": "0.900", **dashes}
    apart = check_rows({"mine": final_of(), "v3": elsewhere})
    assert "generic user's accuracy less the vanilla run's" not in dict(apart)


def test_more_runs_than_fit_go_on_in_a_table_below() -> None:
    finals = {f"{'run' * 5}{i}": checked() for i in range(9)}
    tables = format_checks(finals).split("\n\n")
    assert len(tables) > 1
    assert all(len(line) <= MAX_WIDTH for table in tables for line in table.splitlines())
    assert [name for table in tables for name in cells(table)[0][1:]] == list(finals)
    assert cells(format_checks({"r" * 200: checked(), "s": checked()}))[0][1:] == ["r" * 200], "not cut"


def test_a_sweep_has_the_lowest_and_the_highest_of_its_runs() -> None:
    overlap = {"eval_seen": {"rows": 8, "prompt": 0, "pair": 2, "response": 3}}
    other = checked(ceiling=None, leaks={"overlap": overlap, "shuffled_users": None}, majority={"seen": 0.5})
    rows = cells(format_check_spans({"a": checked(), "b": other}))
    assert rows[0] == ["baselines and checks", "lowest", "highest", "runs"]
    assert ["one preference for all, seen users", "0.500", "0.685", "2"] in rows
    assert ["best possible under the labels' noise", "0.900", "0.900", "1"] in rows
    assert ["seen rows with a training prompt/pair/response", "0/0/3 of 8", "1/2/3 of 8", "2"] in rows
