"""Strict JSON Lines: what a lenient parser would let through is refused by file and line."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, TypeVar, cast

from prlhf.data.quoting import quote
from prlhf.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
MAX_DEPTH = 16
MAX_DIGITS = 4300  # of a whole number; Python converts no longer one
MAX_SKIPPED_SHARE = 0.01
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep; rows hold strings and lists of messages"
TABLES = {".csv": "read_csv", ".tsv": "read_table", ".parquet": "read_parquet", ".xlsx": "read_excel"}  # of pandas
MEND_LINE = "mend or remove the line"
MEND_FILE = "mend the file"
OnBadRow = Literal["error", "skip"]

T = TypeVar("T")
logger = logging.getLogger(__name__)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl, .jsonl.gz or .json file with their line numbers; blank lines are passed over.

    A .json file may hold one array of objects: its entries are numbered from 1.

    Raises: DataError: unreadable file; a line that is truncated, over-long, not UTF-8 or not one JSON object; a byte
        order mark, duplicate key, NaN, lone surrogate or deep nesting.
    """
    for number, outcome in _outcomes(path):
        if isinstance(outcome, DataError):
            raise outcome
        yield number, outcome


def read_rows(
    path: Path, parse: Callable[[dict[str, Any], str], T], *, on_bad_row: OnBadRow = "error"
) -> list[tuple[str, T]]:
    """Parse every object of a file.

    Args:
        parse: (object, "file:line") -> row; raises DataError for a bad one.
        on_bad_row: "skip" passes over at most 1% of the rows and logs how many.
    Returns: ("file:line", row), in the order of the file.
    Raises: DataError: a bad row, or too many of them.
    """
    rows: list[tuple[str, T]] = []
    bad: list[DataError] = []
    for where, outcome in _parsed(path, parse):
        if not isinstance(outcome, DataError):
            rows.append((where, outcome))
        elif on_bad_row == "error":
            raise outcome
        else:
            bad.append(outcome)
    total = len(rows) + len(bad)
    if len(bad) > MAX_SKIPPED_SHARE * total:
        raise DataError(f"{path}: {len(bad)} of {total} rows are bad, more than the {MAX_SKIPPED_SHARE:.0%} that "
                        f"on_bad_row: skip allows; mend the file; the first: {bad[0]}")
    if bad:
        logger.warning("%s: skipped %d bad rows of %d; the first: %s", path, len(bad), total, bad[0])
    return rows


def read_every_row(path: Path, parse: Callable[[dict[str, Any], str], T]) -> list[tuple[str, T]]:
    """As `read_rows`, but the error tells of every bad row.

    Raises: DataError: unreadable file, or a line for each bad row.
    """
    rows: list[tuple[str, T]] = []
    wrong: list[str] = []
    for where, outcome in _parsed(path, parse):
        if isinstance(outcome, DataError):
            wrong += outcome.messages
        else:
            rows.append((where, outcome))
    if wrong:
        raise DataError(*wrong)
    return rows


def _parsed(path: Path, parse: Callable[[dict[str, Any], str], T]) -> Iterator[tuple[str, T | DataError]]:
    """("file:line", the row or what is wrong with it) of each object of a file."""
    for number, outcome in _outcomes(path):
        where = f"{path}:{number}"
        try:
            if isinstance(outcome, DataError):
                raise outcome
            yield where, parse(outcome, where)
        except DataError as error:
            yield where, error


def read_json_object(path: Path) -> dict[str, Any]:
    """The one object in a JSON file, as strictly as a line of read_jsonl.

    Raises: DataError: unreadable, or not one JSON object.
    """
    with _open(path) as file:
        value = _parse(file.read(), str(path), MEND_FILE)
    if not isinstance(value, dict):
        raise DataError(f"{path}: {quote(value)} is not a JSON object; the file holds one {{...}}")
    return _checked_depth(value, str(path))


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one object a line, as UTF-8, atomically: a reader sees the old file or the whole new one.

    Raises: DataError: a value that read_jsonl would refuse (NaN, lone surrogate).
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            for number, record in enumerate(records, start=1):
                file.write(_line(record, f"{path}:{number}"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _line(record: dict[str, Any], where: str) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except ValueError as error:
        raise DataError(f"{where}: cannot be written as JSON ({error}); clean the text") from error


def _outcomes(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Number and object of every row, or the error that stands in its place."""
    refuse_table(path)
    if _holds_array(path):
        with _open(path) as file, _reading(path):
            data = file.read()
        entries = enumerate(_parse(data, str(path), MEND_FILE), start=1)
        for number, entry in entries:
            yield number, _object_or_error(entry, f"{path}:{number}")
        return
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes; write one JSON object a line")
            yield number, _as_object(_parse(line.rstrip(), where, MEND_LINE), where)
        except DataError as error:
            yield number, error


def refuse_table(path: Path) -> None:
    """Refuse a table by its name.

    Raises: DataError: with how it is converted.
    """
    kind = next((suffix.lower() for suffix in path.suffixes[-2:] if suffix.lower() in TABLES), None)
    if kind is not None and path.is_file() and path.suffix.lower() in (kind, ".gz"):
        raise DataError(f"{path}: {kind[1:].upper()} is not read; make JSON Lines of it, in Python with "
                        f"pandas.{TABLES[kind]}({path.name!r}).to_json('rows.jsonl', orient='records', lines=True)")


def _open(path: Path) -> IO[bytes]:
    try:
        return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _holds_array(path: Path) -> bool:
    if ".jsonl" in path.suffixes:
        return False
    with _open(path) as file, _reading(path):
        return file.read(4096).lstrip().startswith(b"[")


@contextlib.contextmanager
def _reading(where: object) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: cannot be read on ({error}); the file is damaged, get it anew") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without blank ones; of an over-long line only the start, one byte more than allowed."""
    number = 0
    with _open(path) as file:
        while True:
            with _reading(f"{path}:{number + 1}"):
                line = rest = file.readline(MAX_LINE_BYTES + 1)
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            number += 1
            if line.strip():
                yield number, line


def _parse(data: bytes, where: str, remedy: str) -> Any:
    if data.startswith(BYTE_ORDER_MARK):
        raise DataError(f"{where}: starts with a byte order mark; save the file as UTF-8 without one")
    if b"\x00" in data:
        raise DataError(f"{where}: holds NUL bytes; save the file as UTF-8 text, or get it anew")
    try:
        text = data.decode("utf-8")
        hooks: dict[str, Any] = {"object_pairs_hook": _unique_keys, "parse_constant": _refuse_constant}
        value = json.loads(text, parse_int=_whole_number, **hooks)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half of a surrogate pair, which is no character; clean the text") from error
    except RecursionError as error:
        raise DataError(f"{where}: {TOO_DEEP}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if remedy == MEND_FILE else f"column {error.colno}"
        raise DataError(f"{where}: not valid JSON at {place} ({error.msg}); {remedy}") from error
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}); {remedy}") from error
    return value


def _object_or_error(value: Any, where: str) -> dict[str, Any] | DataError:
    try:
        return _as_object(value, where)
    except DataError as error:
        return error


def _as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {quote(value)} is not a JSON object; write one {{...}} a line")
    return _checked_depth(value, where)


def _checked_depth(value: dict[str, Any], where: str) -> dict[str, Any]:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise DataError(f"{where}: {TOO_DEEP}")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {quote(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return record


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
