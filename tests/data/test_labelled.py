"""Unpaired rows: read, taken from pairs and paired again, split, tokenized with a response to another prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prlhf.data.check_labelled import make_labelled_report
from prlhf.data.collate import collate_labelled
from prlhf.data.jsonl_prepare import JsonlOptions, prepare_jsonl
from prlhf.data.labelled import labelled_from_pairs, pairs_from_labelled, preferences_from_labelled, tokenize_labelled
from prlhf.data.load import load_judged_data, load_preference_data
from prlhf.data.prepared import load_prepared
from prlhf.data.records import LabelledData, LabelledRow, PreferenceRow, labelled_row
from prlhf.data.user_index import UserIndex
from prlhf.errors import DataError
from tests.data.toy import make_toy_tokenizer

LOAD: dict[str, Any] = {"seed": 1, "eval_prompts": 0.2, "unseen_users": 0.0}
LIMITS = {"max_tokens": 40, "max_prompt_tokens": 20, "num_user_tokens": 3}


def records(num_prompts: int = 20) -> list[dict[str, Any]]:
    """Ann likes the short response to every prompt and not the long one."""
    return [
        {"user_id": "ann", "prompt": f"question {number}", "response": text, "label": label}
        for number in range(num_prompts)
        for text, label in ((f"no {number}", True), (f"no, not at all {number}", False))
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(*labels: tuple[str, str, str, bool]) -> list[LabelledRow]:
    return [LabelledRow(user, prompt, response, label) for user, prompt, response, label in labels]


def test_a_pair_is_a_liked_and_a_disliked_response() -> None:
    pair = PreferenceRow("1", "ann", "p", "good", "bad", "text")
    assert labelled_from_pairs([pair]) == [
        LabelledRow("ann", "p", "good", True, "text"), LabelledRow("ann", "p", "bad", False, "text")
    ]
    (again,) = pairs_from_labelled(labelled_from_pairs([pair]))
    assert (again.user_id, again.prompt, again.chosen, again.rejected, again.user_text) == (
        "ann", "p", "good", "bad", "text"
    )


def test_pairs_are_of_one_user_and_one_prompt() -> None:
    rows = rows_of(
        ("ann", "p", "a", True), ("ann", "p", "b", True), ("ann", "p", "c", False), ("bob", "p", "d", False),
        ("ann", "q", "e", False), ("bob", "r", "f", True), ("bob", "r", "f", False),
    )
    pairs = [(row.user_id, row.chosen, row.rejected) for row in pairs_from_labelled(rows)]
    assert pairs == [("ann", "a", "c"), ("ann", "b", "c")], "a response is no pair with itself"


def test_users_without_a_pair_are_known_all_the_same() -> None:
    data = LabelledData(rows_of(("ann", "p", "a", True), ("bob", "q", "b", False)), [], [], [], "here")
    assert preferences_from_labelled(data).user_ids() == ["ann", "bob"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 1}, "label is 1, expected true or false"),
        ({"label": None}, "label is null"),
        ({"response": None}, "response is null"),
        ({"user_id": ""}, "user_id is empty"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"f:1: {message}"):
        labelled_row({**records(1)[0], **change}, "f:1")


def test_trls_name_for_the_response_is_taken() -> None:
    record = {"user_id": "ann", "prompt": "p", "completion": [{"role": "assistant", "content": "c"}], "label": False}
    assert labelled_row(record, "f:1") == LabelledRow("ann", "p", "c", False)


def test_a_file_is_split_by_prompt(tmp_path: Path) -> None:
    data = load_judged_data(str(write(tmp_path / "a.jsonl", records())), **LOAD)
    assert isinstance(data, LabelledData)
    assert (len(data.train), len(data.dev), len(data.eval_seen)) == (30, 2, 8)
    assert not {row.prompt for row in data.train} & {row.prompt for row in data.eval_seen}


def test_unpaired_rows_are_refused_where_pairs_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records())
    with pytest.raises(DataError, match="holds unpaired rows .* loss.kind kto"):
        load_preference_data(str(path), **LOAD)
    pair = {"user_id": "ann", "prompt": "p", "chosen": "c", "rejected": "r"}
    with pytest.raises(DataError, match=r"40 of 41 rows are unpaired, such as .*a.jsonl:2; keep rows of one kind"):
        load_judged_data(str(write(path, [pair, *records()])), **LOAD)


def test_a_mapped_file_is_prepared_and_loaded(tmp_path: Path) -> None:
    renamed = [{**row, "thumb": row["label"], "answer": row["response"]} for row in records()]
    for row in renamed:
        del row["label"], row["response"], row["user_id"]
    options = JsonlOptions(("label=thumb", "response=answer"), opposed=("short", "long"))
    raw = write(tmp_path / "raw.jsonl", [*renamed, renamed[0]])
    summary = prepare_jsonl(raw, tmp_path / "out", options=options, unseen_users=0.0, eval_prompts=0.2, seed=1)
    assert summary.left_out["duplicate"] == 2
    data = load_prepared(tmp_path / "out")
    assert isinstance(data, LabelledData)
    first, second = data.train[:2]
    assert (first.user_id, second.user_id, first.response) == ("short", "long", second.response)
    assert first.label is not second.label, "opposed users disagree"


def test_the_same_response_on_both_sides_of_the_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", records())
    write(tmp_path / "eval_seen.jsonl", records(1))
    with pytest.raises(DataError, match="eval_seen.jsonl:1: the same prompt and responses as .*train.jsonl:1"):
        load_prepared(tmp_path)


def test_each_row_gets_a_response_to_another_prompt_within_its_budget() -> None:
    rows = [labelled_row(record, "f") for record in records()]
    tokenizer = make_toy_tokenizer()
    tokenized = tokenize_labelled(rows, tokenizer, UserIndex(["ann"]), **LIMITS, seed=5).rows
    by_response = {row.response_ids: row for row in tokenized}
    assert len(tokenized) == 40
    for row in tokenized:
        others = [other for ids, other in by_response.items() if ids[: len(row.mismatched_ids)] == row.mismatched_ids]
        assert any(other.prompt_ids != row.prompt_ids for other in others)
        assert 3 + len(row.prompt_ids) + max(len(row.response_ids), len(row.mismatched_ids)) <= 40
        assert (row.user_id, row.label) == (1, rows[row.row].label)
    taken = {row.mismatched_ids for row in tokenized}
    assert len(taken) > 30, "nearly every response is a mismatched one once"
    again = tokenize_labelled(rows, tokenizer, UserIndex(["ann"]), **LIMITS, seed=5).rows
    assert again == tokenized


def test_rows_with_one_prompt_have_nothing_to_compare_with() -> None:
    rows = [LabelledRow("ann", "p", text, True) for text in ("a", "b")]
    with pytest.raises(DataError, match="at least two different prompts"):
        tokenize_labelled(rows, make_toy_tokenizer(), None, **LIMITS, seed=0)


def test_a_batch_holds_own_and_mismatched_responses_of_the_same_rows() -> None:
    rows = [labelled_row(record, "f") for record in records(2)]
    tokenized = tokenize_labelled(rows, make_toy_tokenizer(), UserIndex(["ann"]), **LIMITS, seed=5).rows
    batch = collate_labelled(tokenized, pad_id=0).to("cpu")
    assert batch.num_rows == 4 and batch.liked.tolist() == [True, False, True, False]
    for part, name in ((batch.responses, "response_ids"), (batch.mismatched, "mismatched_ids")):
        for i, row in enumerate(tokenized):
            scored = part.labels[i][part.labels[i] != -100].tolist()
            assert scored == list(getattr(row, name))
            assert part.input_ids[i][: len(row.prompt_ids)].tolist() == list(row.prompt_ids)
        assert part.user_ids.tolist() == [1] * 4


def test_the_report_shows_labels_pairs_and_contradictions() -> None:
    rows = [labelled_row(record, "f") for record in records(4)]
    contradiction = [LabelledRow("ann", "question 0", "no 0", False)]
    evaluation = rows_of(("ann", "question 9", "no 0", True), ("ann", "question 9", "never", False))
    report = make_labelled_report(
        LabelledData([*rows, *contradiction], [], evaluation, [], "here"), make_toy_tokenizer(), **LIMITS
    )
    assert "train        rows       9  liked       4  prompts       4  users      1  pairs       4" in report
    assert "user 'ann', liked: '<|begin|>question 0" in report and "<<'no 0<|im_end|>'>>" in report
    assert "train: responses liked and disliked by one user 1" in report
    assert "eval_seen of 2: prompt 0 (0.0%), response 1 (50.0%)" in report
