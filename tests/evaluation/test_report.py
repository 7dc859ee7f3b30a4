"""Tables read well and hold the figures they are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prlhf.errors import DataError
from prlhf.evaluation.report import (
    format_answers,
    format_comparison,
    format_figures,
    format_run,
    load_final,
    make_table,
)


def block(mean: float, worst: float = 0.25) -> dict[str, Any]:
    return {
        "mean": mean, "ci95": [mean - 0.1, mean + 0.1], "user_mean": mean, "worst_user": worst, "num_rows": 8,
        "num_users": 2,
    }


def text_block(nll: float | None) -> dict[str, Any]:
    return {"well_formed": 0.9, "repeated_4grams": 0.05, "words": 12.34, "nll_per_token": nll}


def final_of(**changes: Any) -> dict[str, Any]:
    return {
        "experiment": "exp", "method": "pdpo", "user_model": "individual", "step": 7, "seed": 3,
        "data": {"source": "somewhere", "seed": 0},
        "accuracy": {
            "seen": block(0.75), "generic": block(0.5), "unseen": block(0.625), "reference_logps": block(0.375),
        },
        "per_user": {
            "ann": {"accuracy": 1.0, "generic_accuracy": 0.5, "num_rows": 4},
            "bob": {"accuracy": 0.25, "generic_accuracy": 0.75, "num_rows": 4},
        },
        "win_rate": None, "on_side": None, "text": None,
        "throughput": {
            "rows_per_s": 12.0, "tokens_per_s": 99.0, "peak_memory_bytes": 2**30, "peak_device_bytes": 0
        },
        "seconds": 61.0, "seconds_setup": 2.0, "seconds_eval": 3.0,
        **changes,
    }


def judged() -> dict[str, Any]:
    outcome = {"wins": 5, "ties": 1, "losses": 2, "mean": 0.6875}
    return {
        "win_rate": {**outcome, "judge": "rule", "opponent": "reference", "per_user": {"ann": outcome, "bob": outcome}},
        "on_side": {"ann": {"policy": 0.8, "reference": 0.4}, "bob": {"policy": 0.6, "reference": 0.2}},
        "text": {"temperature": 0.7, "policy": text_block(1.5), "reference": text_block(2.5)},
    }


def cells(text: str) -> list[list[str]]:
    """Rows of all Markdown tables in a text, without the rules."""
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("-: ")]


def test_a_table_is_markdown_with_numbers_to_the_right() -> None:
    assert make_table(["name", "n"], [["a", "1"], ["bcdef", "100"]]) == (
        "| name  |   n |\n| ----- | --: |\n| a     |   1 |\n| bcdef | 100 |"
    )


def test_the_ceiling_of_noisy_labels_stands_beside_the_accuracies() -> None:
    label = "best possible under the labels' noise"
    assert [label, "0.900"] in [row[:2] for row in cells(format_figures(final_of(ceiling=0.9)))]
    both = cells(format_comparison({"a": final_of(ceiling=0.9), "b": final_of(ceiling=0.9)}))
    assert both[-1][:4] == [label, "-", "0.900", "-"] and len(both[-1]) == len(both[0])
    for finals in ({"a": final_of()}, {"a": final_of(ceiling=0.9), "b": final_of()}):
        assert label not in format_comparison(finals)


def test_figures_show_each_block_and_each_user() -> None:
    rows = cells(format_figures(final_of()))
    assert ["seen users, own embedding", "0.750", "0.650 to 0.850", "0.250", "8", "2"] in rows
    assert ["the same rows, generic user", "0.500", "0.400 to 0.600", "0.250", "8", "2"] in rows
    assert ["unseen users, generic user", "0.625", "0.525 to 0.725", "0.250", "8", "2"] in rows
    assert ["ann", "1.000", "0.500", "4"] in rows
    assert ["bob", "0.250", "0.750", "4"] in rows


def test_judged_answers_add_columns_and_the_quality_of_the_text() -> None:
    rows = cells(format_figures(final_of(**judged())))
    assert ["ann", "1.000", "0.500", "4", "0.800", "0.400", "5/1/2"] in rows
    assert ["policy", "0.900", "0.050", "1.500", "12.3"] in rows
    assert ["reference", "0.900", "0.050", "2.500", "12.3"] in rows


def tax_of(reference: float, generic: float, users_mean: float | None) -> dict[str, Any]:
    nll = {"reference": reference, "generic": generic, "users_mean": users_mean}
    return {"source": "builtin:text", "num_texts": 9, "num_tokens": 99, "num_users": 2, "nll_per_token": nll}


def test_the_tax_has_a_line_of_its_own() -> None:
    start = "NLL/token of 9 neutral texts (builtin:text): reference 1.000, "
    assert start + "generic user 1.250, mean of 2 users 1.500" in format_figures(final_of(tax=tax_of(1, 1.25, 1.5)))
    assert start + "policy 1.125" in format_figures(final_of(tax=tax_of(1, 1.125, None)))
    assert "neutral" not in format_figures(final_of(tax=None)) + format_figures(final_of())


def test_shares_of_one_preference_and_pairs_apart_in_length_stand_below() -> None:
    apart = {"seen": block(0.875), "generic": block(0.5), "unseen": None, "majority": {"seen": 0.6, "unseen": None}}
    final = final_of(majority={"seen": 0.7, "unseen": 0.8}, slices={"length_gap_20": apart})
    rows = cells(format_figures(final))
    assert ["seen users, own embedding, lengths 20% apart", "0.875", "0.775 to 0.975", "0.250", "8", "2"] in rows
    assert ["one preference for all, seen users", "0.700"] in rows
    assert ["one preference for all, unseen users", "0.800"] in rows
    assert ["one preference for all, lengths 20% apart, seen users", "0.600"] in rows
    assert not any("apart, unseen" in row[0] or row[0].startswith("unseen users, generic user,") for row in rows)


def test_generated_answers_add_their_words_for_users_generic_user_and_reference() -> None:
    words = {"per_user": {"ann": 7.25, "bob": 20.0}, "generic": None, "reference": 12.0}
    rows = cells(format_figures(final_of(words=words)))
    assert ["ann", "1.000", "0.500", "4", "7.2"] in rows and ["bob", "0.250", "0.750", "4", "20.0"] in rows
    assert rows[-2:] == [["(generic)", "", "", "", "-"], ["(reference)", "", "", "", "12.0"]]


def test_without_evaluation_rows_it_says_so() -> None:
    empty = dict.fromkeys(("seen", "generic", "unseen", "reference_logps"))
    assert "no evaluation rows" in format_figures(final_of(accuracy=empty, per_user={}))


def test_answers_that_are_all_empty_have_a_dash_for_their_nll() -> None:
    text = {"temperature": 0.7, "policy": text_block(None), "reference": text_block(2.5)}
    final = final_of(**{**judged(), "text": text})
    assert ["policy", "0.900", "0.050", "-", "12.3"] in cells(format_figures(final))
    assert "-" in cells(format_comparison({"run": final}))[-1]


def test_many_users_are_cut_aloud() -> None:
    users = {f"u{i}": {"accuracy": 1.0, "generic_accuracy": 1.0, "num_rows": 1} for i in range(50)}
    rows = cells(format_figures(final_of(per_user=users)))
    assert rows[-1][0] == "(+10 more)"


def test_a_run_is_reported_with_its_answers_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    records = [
        {"user_id": user, "prompt": prompt, "response": f"{user} on {prompt}"}
        for user in ("ann", "bob") for prompt in ("one", "two", "three", "four")
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "samples" / "policy.jsonl").write_text(lines)
    text = format_run(final_of(), tmp_path)
    assert "exp: method pdpo, user model individual, step 7, seed 3, data somewhere" in text
    assert "> three" in text and "> four" not in text, "three prompts"
    (row,) = [line for line in text.splitlines() if "ann on one" in line]
    assert "bob on one" in row, "two users in one row"
    assert "61 s (12.0 rows/s)" in text and "1.00 GiB" in text
    assert f"run directory: {tmp_path}" in text


@pytest.mark.parametrize(
    ("dev", "expected"),
    [({"nll_per_token": 1.23456, "num_rows": 9}, "NLL per token on dev: 1.2346 (9 rows)"), (None, "no dev rows")],
)
def test_sft_reports_its_nll(tmp_path: Path, dev: dict[str, Any] | None, expected: str) -> None:
    final = final_of(method="sft", dev=dev)
    del final["accuracy"], final["per_user"]
    assert expected in format_run(final, tmp_path)


def test_answers_stand_in_columns_three_users_a_row() -> None:
    text = format_answers("Why?", {"a": "one " * 20, "b": "two", "c": "three", "d": "four"})
    lines = text.splitlines()
    assert lines[0] == "> Why?"
    assert [line.split() for line in lines if line.startswith(("a ", "d"))] == [["a", "b", "c"], ["d"]]
    assert all(len(line) <= 120 for line in lines)


def test_a_comparison_has_a_line_a_run_and_the_reference_first() -> None:
    vanilla = final_of(user_model="none", accuracy={**final_of()["accuracy"], "unseen": None})
    rows = cells(format_comparison({"mine": final_of(**judged()), "vanilla": vanilla}))
    header, *lines = rows
    assert header[-2:] == ["ann", "bob"]
    assert [line[0] for line in lines] == ["reference (by log-probs)", "mine", "vanilla"]
    mine = dict(zip(header, lines[1], strict=True))
    assert (mine["accuracy"], mine["generic"], mine["unseen"]) == ("0.750", "0.500", "0.625")
    assert (mine["on side"], mine["NLL/token"], mine["bob"]) == ("0.700", "1.500", "0.250")
    assert lines[0][2] == "0.375" and lines[0][7] == "0.300"
    assert lines[2][6] == "-"


def test_a_run_without_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"final.json: no such file; finish the run"):
        load_final(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "final.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        load_final(tmp_path)


@pytest.mark.parametrize(
    ("content", "lacking"),
    [
        ([1], "expected a JSON object"),
        (None, "expected a JSON object"),
        ({}, "without a sound experiment, method, user_model, step, seed, data, throughput, seconds"),
        ({**final_of(), "data": "somewhere", "step": None}, "without a sound step, data"),
        ({name: value for name, value in final_of().items() if name != "per_user"}, "without a sound per_user"),
    ],
)
def test_json_that_is_no_evaluation_is_refused_by_name(tmp_path: Path, content: Any, lacking: str) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "final.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        load_final(tmp_path)
    (message,) = caught.value.messages
    assert message.startswith(f"{tmp_path}/eval/final.json: is no final evaluation, {lacking};")


def test_an_evaluation_of_what_has_no_users_needs_no_accuracy(tmp_path: Path) -> None:
    final = {name: value for name, value in final_of().items() if name not in ("accuracy", "per_user")}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "final.json").write_text(json.dumps(final))
    assert load_final(tmp_path) == final


def test_baselines_and_shuffled_users_stand_below_the_accuracies() -> None:
    final = final_of(
        baselines={
            "length_only": {"seen": 0.7, "unseen": None}, "format_only": {"seen": 0.8, "unseen": 0.6},
            "prompted": block(0.55), "few_shot": None,
        },
        leaks={"overlap": {}, "shuffled_users": {"mean": 0.5123, "num_rows": 9, "expected": {"mean": 0.58}}},
    )
    lines = {line.split("|")[1].strip(): line for line in format_figures(final).splitlines() if line.startswith("|")}
    assert "0.700" in lines["length alone, seen users"] and "length alone, unseen users" not in lines
    assert "0.600" in lines["format alone, unseen users"]
    assert "0.550" in lines["reference told the user's wish"] and "0.450 to 0.650" in lines[
        "reference told the user's wish"
    ]
    assert "reference shown the user's pairs" not in lines
    assert "0.512" in lines["users drawn anew (expected 0.580)"]


def test_the_rows_that_training_has_seen_are_named() -> None:
    overlap = {
        "eval_seen": {"rows": 8, "prompt": 1, "pair": 0, "response": 3},
        "eval_unseen": {"rows": 4, "prompt": 0, "pair": 0, "response": 2},
    }
    assert (
        "Shared with training: of 8 seen rows 1 share their prompt, 0 their pair, 3 a response; "
        "of 4 unseen rows 0 share their prompt, 0 their pair, 2 a response"
    ) in format_figures(final_of(leaks={"overlap": overlap, "shuffled_users": None})).splitlines()
    for unknown in ({"eval_seen": {"rows": 8}, "eval_unseen": {"rows": 0}}, {}):
        assert "Shared" not in format_figures(final_of(leaks={"overlap": unknown, "shuffled_users": None}))
    assert "Shared" not in format_figures(final_of())


def test_ids_and_texts_stay_in_their_cell_and_move_no_cursor() -> None:
    figures = final_of()
    figures["per_user"] = {"evil\n| x | 1.0\x1b[31m": figures["per_user"]["ann"]}
    table = format_figures(figures)
    [line] = [line for line in table.splitlines() if "evil" in line]
    assert "\x1b" not in table and "\\| x \\|" in line
    assert "\x1b" not in format_answers("p\x1b", {"a\x1b": "b\x1b"})


def test_runs_on_different_data_are_said_not_to_compare() -> None:
    other = final_of(data={"source": "elsewhere", "seed": 0}, user_model="none")
    table = format_comparison({"a": final_of(), "b": other})
    assert table.startswith("Only runs on the same data compare; these are on somewhere (seed 0), elsewhere (seed 0).")
    names = [row[0] for row in cells(table)]
    assert names[1:3] == [f"reference (by log-probs), {source} (seed 0)" for source in ("somewhere", "elsewhere")]
    assert "Only runs" not in format_comparison({"a": final_of(), "b": final_of()})
