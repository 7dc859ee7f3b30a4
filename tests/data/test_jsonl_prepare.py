"""Preparation of one's own file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from prlhf.data.jsonl_prepare import JsonlOptions, prepare_jsonl, read_mapped_rows
from prlhf.data.prepared import load_prepared
from prlhf.errors import DataError

SHARES = {"unseen_users": 0.0, "eval_prompts": 0.1, "seed": 1}


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_columns_are_mapped_joined_and_made_constant(tmp_path: Path) -> None:
    records = [
        {"annotator": 7, "instruction": "Sum up.", "input": "Text.", "good": "g", "bad": "b", "note": ""},
        {"annotator": "Ā/../", "instruction": "Hi.", "input": "", "good": "g", "bad": "b", "note": ""},
    ]
    raw = write(tmp_path / "rows.jsonl", records)
    mapping = ("user_id=annotator", "prompt=instruction,input", "chosen=good", "rejected=bad")
    rows, left_out = read_mapped_rows(raw, JsonlOptions(mapping))
    assert [(row.user_id, row.prompt, row.chosen, row.rejected) for row in rows] == [
        ("7", "Sum up.\nText.", "g", "b"), ("Ā/../", "Hi.", "g", "b")
    ]
    assert left_out == {}
    rows, _ = read_mapped_rows(raw, JsonlOptions(("user_id=@me", *mapping[1:])))
    assert {row.user_id for row in rows} == {"me"}


def test_fields_without_a_mapping_are_columns_of_the_same_name(tmp_path: Path) -> None:
    record = {"pair_id": 3, "user_id": "u", "prompt": "p", "chosen": "c", "rejected": "r", "user_text": "t"}
    (row,), _ = read_mapped_rows(write(tmp_path / "rows.jsonl", [record]), JsonlOptions())
    assert (row.pair_id, row.user_id, row.user_text) == ("3", "u", "t")


def test_opposed_users_judge_every_pair_in_opposite_ways(tmp_path: Path) -> None:
    raw = tmp_path / "rows.jsonl.gz"
    records = [{"prompt": f"p{number}", "short": "s", "long": "l" * 9} for number in range(40)]
    raw.write_bytes(gzip.compress("\n".join(json.dumps(record) for record in records).encode()))
    options = JsonlOptions(("chosen=short", "rejected=long"), opposed=("concise", "verbose"))
    prepare_jsonl(raw, tmp_path / "out", options=options, **SHARES)
    data = load_prepared(tmp_path / "out")
    assert data.user_ids() == ["concise", "verbose"]
    assert (len(data.train), len(data.dev), len(data.eval_seen)) == (68, 4, 8)
    for first, second in zip(data.train[::2], data.train[1::2], strict=True):
        assert (first.user_id, first.chosen, first.rejected) == ("concise", "s", "l" * 9)
        assert (second.user_id, second.chosen, second.rejected) == ("verbose", "l" * 9, "s")
        assert first.pair_id == second.pair_id and first.prompt == second.prompt


def test_filters_drop_and_count_rows_by_the_value_of_a_column(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = {"user_id": "u", "chosen": "c", "rejected": "r"}
    records = [{**base, "prompt": str(n), "model": model, "ok": ok} for n, (model, ok) in enumerate(
        [("weak", True), ("strong", True), ("strong", False), ("weak", False)]
    )]
    raw = write(tmp_path / "rows.jsonl", records)
    rows, left_out = read_mapped_rows(raw, JsonlOptions(drop=("model=weak", "ok=false")))
    assert [row.prompt for row in rows] == ["1"] and left_out == {"model=weak": 2, "ok=false": 2}
    with pytest.raises(DataError, match="--drop 'modl=weak': .*no column 'modl'; did you mean 'model'"):
        read_mapped_rows(raw, JsonlOptions(drop=("modl=weak",)))
    with caplog.at_level("WARNING"):
        read_mapped_rows(raw, JsonlOptions(drop=("model=week",)))
    assert "no row of" in caplog.text


def test_an_array_with_unusable_rows_is_prepared_and_they_are_counted(tmp_path: Path) -> None:
    raw = tmp_path / "rows.json"
    base = {"user_id": "u", "chosen": "c", "rejected": "r"}
    records = [{**base, "prompt": str(number)} for number in range(30)]
    unusable = [records[0], {**base, "prompt": "x", "rejected": "c"}, {**base, "prompt": " "}]
    raw.write_text(json.dumps([*records, *unusable]))
    summary = prepare_jsonl(raw, tmp_path / "out", **SHARES)
    assert dict(summary.left_out) == {
        "duplicate": 1, "equal_responses": 1, "empty_prompt": 1, "unseen_user_on_training_prompt": 0
    }
    assert sum(summary.num_rows.values()) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (JsonlOptions(("chosen",)), "--map 'chosen': expected field=column"),
        (JsonlOptions(("chosn=a",)), "'chosn' is no field; did you mean 'chosen'"),
        (JsonlOptions(("chosen=prompt", "chosen=rejected")), "chosen is mapped twice"),
        (JsonlOptions(("chosen=choosen",)), "rows.jsonl:1: no column 'choosen'; did you mean 'chosen'"),
        (JsonlOptions(("prompt=prompt,number",)), "only columns of strings can be joined"),
        (JsonlOptions(("user_id=flag",)), "user_id is True, expected a string"),
        (JsonlOptions(), "rows.jsonl:1: no user_id; name its column"),
        (JsonlOptions(drop=("model",)), "--drop 'model': expected column=value"),
        (JsonlOptions(("user_id=number",), opposed=("a", "b")), "for files without a user column"),
        (JsonlOptions(opposed=("a", "a")), "'a' twice"),
    ],
)
def test_bad_options_and_unknown_columns_are_refused(tmp_path: Path, options: JsonlOptions, message: str) -> None:
    record = {"prompt": "p", "chosen": "c", "rejected": "r", "number": 5, "flag": True}
    with pytest.raises(DataError) as caught:
        prepare_jsonl(write(tmp_path / "rows.jsonl", [record]), tmp_path / "out", options=options, **SHARES)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_occupied_output_directory_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="holds other files"):
        prepare_jsonl(tmp_path / "absent.jsonl", tmp_path / "out", **SHARES)


def test_public_files_are_prepared_with_opposed_users(shared_data: Path, tmp_path: Path) -> None:
    """1,100 pairs of which 6 are identical."""
    raw = shared_data / "polite_pairs" / "instruction-data-with-preference.json"
    options = JsonlOptions(("prompt=instruction,input",), opposed=("polite", "rude"))
    summary = prepare_jsonl(raw, tmp_path / "out", options=options, **SHARES)
    assert sum(summary.num_rows.values()) == 2 * (1100 - 6) and summary.left_out["equal_responses"] == 2 * 6
    data = load_prepared(tmp_path / "out")
    assert data.user_ids() == ["polite", "rude"]
