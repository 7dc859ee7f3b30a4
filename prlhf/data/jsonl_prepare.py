"""Preparation of one's own file of preferences: columns are mapped, rows filtered, users made."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prlhf.data.clean import clean_rows, pair_id_conflicts
from prlhf.data.jsonl import read_rows
from prlhf.data.prepared import PreparedSummary, all_labelled, check_writable, write_prepared
from prlhf.data.quoting import did_you_mean, quote
from prlhf.data.records import (
    LABELLED_FIELDS,
    PREFERENCE_FIELDS,
    JudgedRow,
    LabelledRow,
    PreferenceRow,
    is_labelled,
    labelled_row,
    preference_row,
)
from prlhf.data.splits import split_labelled, split_preferences
from prlhf.errors import DataError

FIELDS = tuple(dict.fromkeys((*PREFERENCE_FIELDS, *LABELLED_FIELDS)))
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JsonlOptions:
    """How rows are made of a file's columns.

    Args:
        mapping: "field=column" each; "prompt=instruction,input" joins columns with a line break, empty ones left out;
            "user_id=@name" is a constant. Fields without a mapping are columns of the same name.
        drop: "column=value" each; rows with that value are left out.
        opposed: two user ids: each pair is written for the first as mapped, for the second with chosen and rejected
            swapped. For files without a user column.
    """

    mapping: Sequence[str] = ()
    drop: Sequence[str] = ()
    opposed: tuple[str, str] | None = None


@dataclass
class _Filter:
    """A `drop` filter and what it met."""

    column: str
    value: str
    num_dropped: int = 0
    columns: set[str] = field(default_factory=set)

    def drops(self, record: Mapping[str, Any]) -> bool:
        """Whether the record is left out; counts it, and remembers the columns met."""
        self.columns.update(record)
        value = record.get(self.column)
        dropped = self.column in record and self.value == (value if isinstance(value, str) else json.dumps(value))
        self.num_dropped += dropped
        return dropped


def prepare_jsonl(
    raw: Path,
    out: Path,
    *,
    options: JsonlOptions = JsonlOptions(),
    unseen_users: float,
    eval_prompts: float,
    seed: int,
    force: bool = False,
) -> PreparedSummary:
    """Read a .jsonl, .jsonl.gz or .json file and write a prepared directory.

    Raises: DataError: a bad option, an unknown column, a bad row, or `out` is not empty.
    """
    check_writable(out, force=force)
    rows, left_out = read_mapped_rows(raw, options)
    split_rows: Any = split_labelled if isinstance(rows[0], LabelledRow) else split_preferences
    split = split_rows(rows, source=str(raw), seed=seed, eval_prompts=eval_prompts, unseen_users=unseen_users)
    left_out["unseen_user_on_training_prompt"] = split.num_left_out
    return write_prepared(out, split.data, force=force, left_out=left_out)


def read_mapped_rows(raw: Path, options: JsonlOptions) -> tuple[list[Any], dict[str, int]]:
    """Rows of a file with the options applied: pairs, or unpaired rows where there is a label and no chosen response.

    Returns: (rows of one kind, at least one; reason -> number of rows left out).
    Raises: DataError: a bad option, an unknown column, a bad row, rows of both kinds, or no row left.
    """
    mapping = _parse_mapping(options)
    filters = [_Filter(*_assignment(text, "drop", "column=value")) for text in options.drop]

    def parse(record: dict[str, Any], where: str) -> JudgedRow | None:
        """The row, or None where a filter leaves it out; every filter sees every record."""
        hits = [drop.drops(record) for drop in filters]
        if any(hits):
            return None
        fields = _mapped(record, mapping, where)
        return labelled_row(fields, where) if is_labelled(fields) else preference_row(fields, where)

    read = read_rows(raw, parse)
    _check_filters(filters, raw)
    located = [(where, row) for where, row in read if row is not None]
    all_labelled(located, raw)
    conflicts = pair_id_conflicts((where, row) for where, row in located if isinstance(row, PreferenceRow))
    if conflicts:
        raise DataError(*conflicts)
    rows: list[Any] = [row for _, row in located]
    if options.opposed is not None:
        rows = [judgment for row in rows for judgment in _both_ways(row, *options.opposed)]
    kept, dropped = clean_rows(rows)
    if not kept:
        raise DataError(f"{raw}: no usable rows of {len(read)}; mend the file or the options")
    left_out = Counter(dropped)
    left_out.update({f"{drop.column}={drop.value}": drop.num_dropped for drop in filters})
    return kept, dict(left_out)


def _both_ways(row: JudgedRow, first: str, second: str) -> tuple[JudgedRow, JudgedRow]:
    as_mapped = replace(row, user_id=first)
    if isinstance(row, LabelledRow):
        return as_mapped, replace(row, user_id=second, label=not row.label)
    return as_mapped, replace(row, user_id=second, chosen=row.rejected, rejected=row.chosen)


def _parse_mapping(options: JsonlOptions) -> dict[str, Callable[[dict[str, Any], str], Any]]:
    """Field -> function that takes its value from a record."""
    readers: dict[str, Callable[[dict[str, Any], str], Any]] = {}
    for text in options.mapping:
        name, source = _assignment(text, "map", "field=column")
        if name not in FIELDS:
            raise DataError(f"--map {quote(text)}: {quote(name)} is no field{did_you_mean(name, FIELDS)}; "
                            f"fields are {', '.join(FIELDS)}")
        if name in readers:
            raise DataError(f"--map {quote(text)}: {name} is mapped twice; give one mapping a field")
        readers[name] = _constant(source[1:]) if source.startswith("@") else _columns(source.split(","))
    if options.opposed is not None:
        if "user_id" in readers:
            raise DataError("--map user_id with --opposed: opposed users are for files without a user column; "
                            "give one of the two")
        if options.opposed[0] == options.opposed[1]:
            raise DataError(f"--opposed: {quote(options.opposed[0])} twice; give two different user ids")
        readers["user_id"] = _constant(options.opposed[0])
    return readers


def _assignment(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise DataError(f"--{option} {quote(text)}: expected {form}")
    return name, value


def _mapped(
    record: dict[str, Any], mapping: Mapping[str, Callable[[dict[str, Any], str], Any]], where: str
) -> dict[str, Any]:
    fields = {name: record[name] for name in FIELDS if name in record}
    fields.update({name: read(record, where) for name, read in mapping.items()})
    if "user_id" not in fields:
        raise DataError(f"{where}: no user_id; name its column (--map user_id=COLUMN), one user for all rows "
                        "(--map user_id=@NAME), or two opposed users (--opposed A B)")
    for name in ("user_id", "pair_id"):
        if type(fields.get(name)) is int:
            fields[name] = str(fields[name])
    return fields


def _constant(value: str) -> Callable[[dict[str, Any], str], Any]:
    return lambda record, where: value


def _columns(columns: Sequence[str]) -> Callable[[dict[str, Any], str], Any]:
    def read(record: dict[str, Any], where: str) -> Any:
        """The column's value, or several columns of text joined by line breaks."""
        for column in columns:
            if column not in record:
                raise DataError(f"{where}: no column {quote(column)}{did_you_mean(column, record)}; "
                                f"there are {quote(sorted(record))}")
        values = [record[column] for column in columns]
        if len(values) == 1:
            return values[0]
        if not all(isinstance(value, str) for value in values):
            raise DataError(f"{where}: only columns of strings can be joined, got {quote(values)}")
        return "\n".join(value for value in values if value)

    return read


def _check_filters(filters: Sequence[_Filter], raw: Path) -> None:
    for drop in filters:
        if drop.column not in drop.columns:
            raise DataError(f"--drop {quote(f'{drop.column}={drop.value}')}: {raw} has no column {quote(drop.column)}"
                            f"{did_you_mean(drop.column, drop.columns)}")
        if drop.num_dropped == 0:
            logger.warning("--drop %s=%s: no row of %s has this value", drop.column, drop.value, raw)
