"""Reader of UKPConvArg1: real people's judgments of which of two arguments convinces more.

Source: Habernal and Gurevych 2016, ACL; github.com/UKPLab/acl2016-convincing-arguments. Expected in the raw folder:
`arguments.jsonl` {arg_id, topic, title, stance, text} and `judgments.csv.gz` with the columns user, arg1, arg2 and
choice (a1, a2 or equal).
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prlhf.data.clean import clean_rows
from prlhf.data.jsonl import read_rows
from prlhf.data.prepared import PreparedSummary, check_writable, write_prepared
from prlhf.data.quoting import quote
from prlhf.data.records import PreferenceRow, make_pair_id
from prlhf.data.splits import split_preferences
from prlhf.errors import DataError

COLUMNS = ["user", "arg1", "arg2", "choice"]
HoldOut = Literal["pairs", "debates"]


@dataclass(frozen=True)
class Argument:
    """One argument; `topic` names its debate and the side it takes."""

    topic: str
    title: str
    stance: str
    text: str

    @property
    def prompt(self) -> str:
        """The debate and the side, as the prompt that the argument answers."""
        return f"Debate: {self.title}\nStance: {self.stance}"


def prepare_convarg(
    raw: Path,
    out: Path,
    *,
    unseen_users: float,
    eval_prompts: float,
    seed: int,
    min_judgments: int = 40,
    max_users: int | None = None,
    hold_out: HoldOut = "pairs",
    force: bool = False,
) -> PreparedSummary:
    """Read the judgments and write a prepared directory with one user a worker.

    With pairs held out, the arguments of an evaluation pair occur in training in other pairs, so a model that remembers
    how strong an argument is looks skilled; with debates held out (one side of one question each), it does not.

    Args:
        eval_prompts: share of the pairs or debates held out.
        min_judgments: a worker with fewer strict judgments (`equal` is none) is left out.
        max_users: keep only the workers with the most strict judgments; None keeps all.
        hold_out: what evaluation rows share with no training row.
    Raises: DataError: a file is missing or malformed, no worker is left, or `out` is not empty.
    """
    check_writable(out, force=force)
    rows, left_out = read_convarg(raw)
    users = active_users(rows, min_judgments=min_judgments, max_users=max_users)
    if not users:
        raise DataError(f"{raw}: no worker has {min_judgments} strict judgments; lower the limit")
    kept = [row for row in rows if row.user_id in users]
    split = split_preferences(
        kept,
        source=str(raw),
        seed=seed,
        eval_prompts=eval_prompts,
        unseen_users=unseen_users,
        group=(lambda row: row.prompt) if hold_out == "debates" else (lambda row: row.pair_id),
    )
    left_out["worker_with_few_judgments"] = len(rows) - len(kept)
    left_out["unseen_user_on_training_prompt"] = split.num_left_out
    return write_prepared(out, split.data, force=force, left_out=left_out)


def read_convarg(raw: Path) -> tuple[list[PreferenceRow], dict[str, int]]:
    """All strict judgments, as rows.

    Returns: (rows, reason -> number of judgments left out).
    Raises: DataError: a file is missing or malformed, or a judgment names an unknown argument.
    """
    arguments = _read_arguments(raw / "arguments.jsonl")
    path = raw / "judgments.csv.gz"
    rows = []
    num_equal = 0
    for number, judgment in enumerate(_read_judgments(path), start=2):
        where = f"{path}:{number}"
        if judgment["choice"] not in ("a1", "a2", "equal"):
            raise DataError(f"{where}: choice is {quote(judgment['choice'])}, expected a1, a2 or equal")
        if judgment["choice"] == "equal":
            num_equal += 1
        else:
            rows.append(_row(judgment, arguments, where))
    kept, dropped = clean_rows(rows)
    return kept, {"equal": num_equal, **dropped}


def active_users(rows: Sequence[PreferenceRow], *, min_judgments: int, max_users: int | None = None) -> set[str]:
    """Users with at least `min_judgments` rows; of these the `max_users` with the most, ties by id."""
    counts = Counter(row.user_id for row in rows)
    ranked = sorted(counts, key=lambda user_id: (-counts[user_id], user_id))
    return {user_id for user_id in ranked[:max_users] if counts[user_id] >= min_judgments}


def _row(judgment: Mapping[str, str], arguments: Mapping[str, Argument], where: str) -> PreferenceRow:
    for name in ("arg1", "arg2"):
        if judgment[name] not in arguments:
            raise DataError(f"{where}: {name} {quote(judgment[name])} is not in arguments.jsonl; "
                            "use files of one release")
    first, second = arguments[judgment["arg1"]], arguments[judgment["arg2"]]
    if first.topic != second.topic:
        raise DataError(f"{where}: the arguments belong to {quote(first.topic)} and {quote(second.topic)}, "
                        "expected one debate; use files of one release")
    chosen, rejected = (first, second) if judgment["choice"] == "a1" else (second, first)
    pair_id = make_pair_id(first.prompt, first.text, second.text)
    return PreferenceRow(pair_id, judgment["user"], first.prompt, chosen.text, rejected.text)


def _read_arguments(path: Path) -> dict[str, Argument]:
    def parse(record: dict[str, Any], where: str) -> tuple[str, Argument]:
        """The argument under its id."""
        values = [record.get(name) for name in ("arg_id", "topic", "title", "stance", "text")]
        if not all(isinstance(value, str) for value in values):
            raise DataError(f"{where}: expected the strings arg_id, topic, title, stance and text, got {quote(record)}")
        arg_id, topic, title, stance, text = values
        return str(arg_id), Argument(str(topic), str(title), str(stance), str(text))

    return dict(argument for _, argument in read_rows(path, parse))


def _read_judgments(path: Path) -> list[dict[str, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            judgments = list(reader)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); give the folder with judgments.csv.gz") from error
    if list(reader.fieldnames or []) != COLUMNS:
        raise DataError(f"{path}:1: columns {quote(reader.fieldnames)}, expected {', '.join(COLUMNS)}")
    for number, judgment in enumerate(judgments, start=2):
        if len(judgment) != len(COLUMNS) or None in judgment.values():
            raise DataError(f"{path}:{number}: expected {len(COLUMNS)} fields, got {quote(judgment)}")
    return judgments
