"""The strict reader: everything in the fault matrix about JSON lines; bad lines are files of tests/corpus/jsonl."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prlhf.data import jsonl
from prlhf.data.jsonl import read_json_object, read_jsonl, read_rows, write_jsonl
from prlhf.errors import DataError


def keep(record: dict, where: str) -> dict:
    return record


def test_an_over_long_line_is_refused_without_reading_it_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    good = b'{"a": "' + b"x" * 90 + b'"}\n'
    path.write_bytes(good + b'{"a": "' + b"x" * 1000 + b'"}\n' + good)
    longest = max(len(line) for _, line in jsonl._lines(path))
    assert longest == 101
    outcomes = [outcome for _, outcome in jsonl._outcomes(path)]
    assert [isinstance(outcome, DataError) for outcome in outcomes] == [False, True, False]
    assert f"{path}:2: longer than 100 bytes" in str(outcomes[1])


def test_skip_passes_over_one_percent_and_refuses_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 50 + b"broken\n" + b'{"a": 1}\n' * 49)
    with caplog.at_level("WARNING"):
        rows = read_rows(path, keep, on_bad_row="skip")
    assert len(rows) == 99 and rows[50][0] == f"{path}:52"
    assert "skipped 1 bad rows of 100" in caplog.text and f"{path}:51" in caplog.text
    path.write_bytes(b'{"a": 1}\n' * 98 + b"broken\n" * 2)
    with pytest.raises(DataError, match=r"2 of 100 rows are bad.*rows\.jsonl:99"):
        read_rows(path, keep, on_bad_row="skip")


def test_skip_counts_rows_that_the_caller_refuses(tmp_path: Path) -> None:
    def parse(record: dict, where: str) -> dict:
        if record["a"] == 7:
            raise DataError(f"{where}: seven")
        return record

    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ({"a": number} for number in range(100)))
    assert [row["a"] for _, row in read_rows(path, parse, on_bad_row="skip")] == [n for n in range(100) if n != 7]
    with pytest.raises(DataError, match=":8: seven"):
        read_rows(path, parse)


def test_blank_lines_count_as_lines_and_a_last_line_may_lack_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \r\n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]


def test_gzip_and_array_files_hold_the_same_rows(tmp_path: Path) -> None:
    records = [{"a": "é\u2028"}, {"a": "b"}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps(r) for r in records).encode()))
    (tmp_path / "b.json").write_text(json.dumps(records, indent=2))
    (tmp_path / "c.json").write_text("\n".join(json.dumps(r) for r in records))
    for name in ("a.jsonl.gz", "b.json", "c.json"):
        assert [record for _, record in read_jsonl(tmp_path / name)] == records


def test_bad_entry_of_an_array_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, 5]')
    with pytest.raises(DataError, match=r"rows\.json:2: 5 is not a JSON object"):
        list(read_jsonl(path))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
def test_damaged_or_missing_files_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = b'{"a": 1}\n' * 100_000 if name == "rows.jsonl.gz" else b"[" + b'{"a": 1}, ' * 100_000 + b"{}]"
    path.write_bytes(gzip.compress(rows)[:-20])
    with pytest.raises(DataError, match="the file is damaged"):
        list(read_jsonl(path))
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match="cannot be read on"):
        list(read_jsonl(path))
    with pytest.raises(DataError, match="absent.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_jsonl(tmp_path))


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(), st.text() | st.lists(st.text(max_size=5)), max_size=4), max_size=5))
def test_any_text_survives_writing_and_reading(tmp_path_factory: pytest.TempPathFactory, records: list[dict]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    write_jsonl(path, records)
    assert [record for _, record in read_jsonl(path)] == records


JSON_PIECES = [
    b"{", b"}", b"[", b"]", b":", b",", b'"', b'"a"', b"1", b"NaN", b"1e999", b"null", b"\\u", b"d83d", b" ", b"\x00",
]
RECORDS = st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers() | st.none(), min_size=1, max_size=3)


@settings(max_examples=200)
@given(line=st.binary(max_size=30) | st.lists(st.sampled_from(JSON_PIECES), max_size=12).map(b"".join))
def test_any_bytes_are_read_as_json_reads_them_or_refused_by_file_and_line(
    tmp_path_factory: pytest.TempPathFactory, line: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    path.write_bytes(b'{"a": 0}\n' + line + b"\n")
    try:
        read = [record for _, record in read_jsonl(path)][1:]
    except DataError as error:
        assert re.match(re.escape(str(path)) + r":[2-9]\d*: .*; ", str(error))
    else:
        assert read == [json.loads(text) for text in line.split(b"\n") if text.strip()]


@settings(max_examples=100)
@given(record=RECORDS, data=st.data())
def test_a_line_that_lost_its_end_is_refused(
    tmp_path_factory: pytest.TempPathFactory, record: dict, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    write_jsonl(path, [{"a": 0}, record])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: data.draw(st.integers(first + 1, len(whole) - 2))])
    with pytest.raises(DataError, match=r"cut\.jsonl:2: not (valid JSON|UTF-8)"):
        list(read_jsonl(path))


@pytest.mark.parametrize("value", ["\ud800", float("nan")])
def test_unreadable_values_are_not_written_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": "old"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: cannot be written"):
        write_jsonl(path, [{"a": "new"}, {"a": value}])
    assert [record for _, record in read_jsonl(path)] == [{"a": "old"}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_object_file_is_as_strict_as_a_line(tmp_path: Path) -> None:
    path = tmp_path / "users.json"
    path.write_text('{"a": {},\n "a": {}}')
    with pytest.raises(DataError, match="the key 'a' is there twice"):
        read_json_object(path)
