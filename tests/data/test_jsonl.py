"""The strict reader: everything in the fault matrix about JSON lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prlhf.data import jsonl
from prlhf.data.jsonl import read_json_object, read_jsonl, read_rows, write_jsonl
from prlhf.errors import DataError

BAD_LINES = {
    "truncated": (b'{"a": 1', "not valid JSON"),
    "not an object": (b"[1, 2]", "not a JSON object"),
    "bare string": (b'"text"', "not a JSON object"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "duplicate key": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
    "escaped lone surrogate": (b'{"a": "\\ud83d"}', "surrogate"),
    "surrogate in a key": (b'{"\\udc00": 1}', "surrogate"),
    "encoded surrogate": (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
    "latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "deep nesting": (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "levels deep"),
    "very deep nesting": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    "two objects": (b'{"a": 1} {"b": 2}', "not valid JSON"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "NUL bytes": (b"\x00\x00\x00", "not valid JSON"),
}


def keep(record: dict, where: str) -> dict:
    return record


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_refused_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path))
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


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


def test_damaged_or_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100_000)[:-20])
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
