"""The prepared data directory: train, dev, eval_seen, eval_unseen as JSON Lines, and optionally users.json.

`origin.json` is there for rows of a built-in data set: {"source": "builtin:NAME", "ceiling": share or null}.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from prlhf.data.clean import clean_rows, pair_id_conflicts, shared_pairs
from prlhf.data.jsonl import OnBadRow, read_json_object, read_rows, write_jsonl
from prlhf.data.quoting import quote
from prlhf.data.records import (
    LABELLED_FIELDS,
    PREFERENCE_FIELDS,
    JudgedRow,
    LabelledData,
    LabelledRow,
    PreferenceData,
    PreferenceRow,
    is_labelled,
    labelled_row,
    preference_row,
    record_from_row,
)
from prlhf.data.user_index import check_user_id
from prlhf.errors import DataError
from prlhf.files import (
    find_beside,
    find_temporaries,
    fsync_path,
    lock_beside,
    publish_directory,
    remove_directories,
    remove_temporaries,
    writing_directory,
)

SPLITS = ("train", "dev", "eval_seen", "eval_unseen")
USERS_FILE = "users.json"
ORIGIN_FILE = "origin.json"
REPLACED = "old"  # .NAME.old-PID is the directory that is being replaced
logger = logging.getLogger(__name__)

Located = list[tuple[str, JudgedRow]]


@dataclass(frozen=True)
class PreparedSummary:
    """What was written, and what was left out.

    Args:
        num_rows: split -> rows.
        left_out: reason -> rows of the raw data.
    """

    directory: Path
    num_rows: Mapping[str, int]
    num_users: int
    left_out: Mapping[str, int]

    def __str__(self) -> str:
        splits = ", ".join(f"{name} {count}" for name, count in self.num_rows.items())
        left_out = ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items())) or "nothing"
        return f"{self.directory}: rows: {splits}; users in training: {self.num_users}; left out: {left_out}"


def write_prepared(
    directory: Path,
    data: PreferenceData | LabelledData,
    *,
    force: bool = False,
    left_out: Mapping[str, int] | None = None,
) -> PreparedSummary:
    """Write a prepared directory atomically: it appears whole or not at all.

    Of a process that was killed while it replaced one, the next call puts the old one back and removes the rest.

    Args:
        force: replace an earlier prepared directory; anything else that is not empty is refused all the same.
        left_out: for the summary.
    Raises: DataError: the directory exists and is not empty, or cannot be written. RunDirError: another process is
        writing it.
    """
    directory = directory.expanduser().resolve()
    try:
        with writing_directory(directory) as temporary:
            _clear_replaced(directory)
            _refuse_occupied(directory, force=force)
            _write_files(temporary, data)
            fsync_path(temporary)
            try:
                if directory.exists():
                    directory.rename(directory.with_name(f".{directory.name}.{REPLACED}-{os.getpid()}"))
                publish_directory(temporary, directory)
            finally:
                _clear_replaced(directory)
    except OSError as error:
        raise DataError(f"{directory}: cannot be written ({error.strerror}); "
                        "free space or choose another --out") from error
    num_rows = {name: len(getattr(data, name)) for name in SPLITS}
    return PreparedSummary(directory, num_rows, len(data.user_ids()), dict(left_out or {}))


def check_writable(directory: Path, *, force: bool) -> None:
    """Refuse, before any work, an output directory that holds something.

    What killed processes left of it goes first, and a directory that one had moved away to replace it is put back.

    Raises: DataError: it is a file, or not empty and not an earlier prepared directory that `force` may replace.
        RunDirError: another process is writing it.
    """
    directory = directory.expanduser().resolve()
    if find_temporaries(directory) or find_beside(directory, REPLACED):
        with lock_beside(directory):
            remove_temporaries(directory)
            _clear_replaced(directory)
    _refuse_occupied(directory, force=force)


def _refuse_occupied(directory: Path, *, force: bool) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir():
        raise DataError(f"{directory}: is a file; --out names a directory")
    names = {path.name for path in directory.iterdir()}
    if not names <= {USERS_FILE, ORIGIN_FILE, *(f"{name}.jsonl" for name in SPLITS)}:
        raise DataError(f"{directory}: holds other files than prepared data; choose another --out")
    if not force:
        raise DataError(f"{directory}: already holds prepared data; choose another --out, or replace it with --force")


def load_prepared(directory: Path, *, on_bad_row: OnBadRow = "error") -> PreferenceData | LabelledData:
    """Load a prepared directory, of pairs or of unpaired rows, and check it.

    Raises: DataError: no train.jsonl; a bad row; rows of both kinds; a pair_id for two different pairs; a pair in two
        of train, dev and evaluation; a user on the wrong side of users.json; an origin.json that says something else.
    """
    if not (directory / "train.jsonl").is_file():
        raise DataError(f"{directory}: no train.jsonl; give a directory made by `prlhf data prepare`")
    located = {name: _load_split(directory / f"{name}.jsonl", on_bad_row) for name in SPLITS}
    users = _load_users(directory / USERS_FILE)
    if users is not None:
        located = {name: [(where, _with_user_text(row, users, where)) for where, row in rows]
                   for name, rows in located.items()}
    labelled = all_labelled([pair for part in located.values() for pair in part], directory)
    _check_pairs(located)
    _check_users(located, users)
    rows: Any = {name: clean_and_warn(directory / f"{name}.jsonl", part) for name, part in located.items()}
    if not rows["train"]:
        raise DataError(f"{directory / 'train.jsonl'}: no usable rows; training needs at least one")
    declared = None if users is None else tuple(user_id for user_id, user in users.items() if user["split"] == "seen")
    make = LabelledData if labelled else PreferenceData
    preferences = {user_id: user["preference"] for user_id, user in (users or {}).items() if "preference" in user}
    origin, ceiling = _load_origin(directory / ORIGIN_FILE)
    return make(
        **rows, source=str(directory), declared_users=declared, ceiling=ceiling, preferences=preferences, origin=origin
    )


def read_judgments(path: Path, on_bad_row: OnBadRow) -> Located:
    """("file:line", row) of a file of pairs or unpaired rows; columns that are not used are named in a warning.

    Raises: DataError: see read_rows, preference_row and labelled_row.
    """
    ignored: Counter[str] = Counter()

    def parse(record: dict[str, Any], where: str) -> JudgedRow:
        ignored.update(record.keys() - set(LABELLED_FIELDS if is_labelled(record) else PREFERENCE_FIELDS))
        return labelled_row(record, where) if is_labelled(record) else preference_row(record, where)

    located = read_rows(path, parse, on_bad_row=on_bad_row)
    if ignored:
        logger.warning("%s: columns that are not used: %s", path, quote(sorted(ignored)))
    return located


def all_labelled(located: Located, path: Path) -> bool:
    """Whether the rows are unpaired ones.

    Raises: DataError: some are and some are not.
    """
    labelled = [where for where, row in located if isinstance(row, LabelledRow)]
    if 0 < len(labelled) < len(located):
        raise DataError(f"{path}: {len(labelled)} of {len(located)} rows are unpaired, such as {labelled[0]}; "
                        "keep rows of one kind together")
    return bool(labelled)


def clean_and_warn(path: Path, located: Located) -> list[Any]:
    """clean_rows, with what is left out in a warning."""
    given: list[Any] = [row for _, row in located]
    rows, dropped = clean_rows(given)
    if dropped:
        logger.warning("%s: left out of %d rows: %s", path, len(located), dropped)
    return rows


def _write_files(directory: Path, data: PreferenceData | LabelledData) -> None:
    is_declared = data.declared_users is not None or data.preferences
    users = _declared(data) if is_declared else None
    for name in SPLITS:
        rows = getattr(data, name) if users is None else _without_texts(getattr(data, name), users)
        write_jsonl(directory / f"{name}.jsonl", map(record_from_row, rows))
    if users is not None:
        write_jsonl(directory / USERS_FILE, [users])
    if data.world is not None:
        write_jsonl(directory / ORIGIN_FILE, [{"source": data.world, "ceiling": data.ceiling}])


def _clear_replaced(directory: Path) -> None:
    """Delete what was moved away to be replaced; put it back where nothing took its place. Call it under the lock."""
    for replaced in find_beside(directory, REPLACED):
        if not directory.exists():
            publish_directory(replaced, directory)
    remove_directories(find_beside(directory, REPLACED))


def _load_split(path: Path, on_bad_row: OnBadRow) -> Located:
    return read_judgments(path, on_bad_row) if path.exists() else []


def _check_pairs(located: Mapping[str, Located]) -> None:
    everything = [pair for name in SPLITS for pair in located[name]]
    parts: Sequence[Located] = (located["train"], located["dev"], located["eval_seen"] + located["eval_unseen"])
    messages = pair_id_conflicts((where, row) for where, row in everything if isinstance(row, PreferenceRow))
    for first, second in combinations(parts, 2):
        messages += shared_pairs(first, second)
    if messages:
        raise DataError(*messages)


def _check_users(located: Mapping[str, Located], users: Mapping[str, dict[str, str]] | None) -> None:
    if users is None:
        seen = {row.user_id for _, row in located["train"]}
    else:
        seen = {user_id for user_id, user in users.items() if user["split"] == "seen"}
    for name in SPLITS:
        expected_seen = name != "eval_unseen"
        for where, row in located[name]:
            if (row.user_id in seen) != expected_seen:
                side = "a seen" if row.user_id in seen else "not a seen"
                raise DataError(f"{where}: user {quote(row.user_id)} is {side} user, which {name} does not take; "
                                "move the row, or mend users.json")


def _declared(data: PreferenceData | LabelledData) -> dict[str, dict[str, str]]:
    """users.json, with the wishes of users, and the texts of those whose rows all carry the same one."""
    texts = data.user_texts()
    splits = dict.fromkeys(data.user_ids(), "seen") | dict.fromkeys((row.user_id for row in data.eval_unseen), "unseen")
    users: dict[str, dict[str, str]] = {}
    for user_id, split in splits.items():
        users[user_id] = {"user_text": texts[user_id], "split": split} if user_id in texts else {"split": split}
        if user_id in data.preferences:
            users[user_id]["preference"] = data.preferences[user_id]
    return users


def _without_texts(rows: Sequence[Any], users: Mapping[str, dict[str, str]]) -> list[Any]:
    """The rows without what users.json says of their users."""
    return [replace(row, user_text="") if "user_text" in users[row.user_id] else row for row in rows]


def _load_users(path: Path) -> dict[str, dict[str, str]] | None:
    if not path.exists():
        return None
    users = read_json_object(path)
    for user_id, user in users.items():
        check_user_id(user_id, str(path))
        where = f"{path}: user {quote(user_id)}"
        if not isinstance(user, dict) or user.get("split") not in ("seen", "unseen"):
            raise DataError(f'{where}: {quote(user)}, expected {{"user_text": string, "split": "seen" or "unseen"}}')
        user.setdefault("user_text", "")
        for name in ("user_text", "preference"):
            if not isinstance(user.get(name, ""), str):
                raise DataError(f"{where}: {name} is {quote(user[name])}, expected a string")
    return users


def _load_origin(path: Path) -> tuple[str | None, float | None]:
    """The built-in data set that the rows are from, and its ceiling, where they are known."""
    if not path.exists():
        return None, None
    origin = read_json_object(path)
    source, ceiling = origin.get("source"), origin.get("ceiling")
    is_share = ceiling is None or (type(ceiling) in (int, float) and 0 <= ceiling <= 1)
    if not isinstance(source, str) or not is_share:
        raise DataError(f'{path}: {quote(origin)}, expected {{"source": "builtin:NAME", "ceiling": share or null}}; '
                        "mend it, or remove it if the rows are not built-in ones")
    return source, ceiling


def _with_user_text(row: JudgedRow, users: Mapping[str, dict[str, str]], where: str) -> JudgedRow:
    if row.user_id not in users:
        raise DataError(f"{where}: user {quote(row.user_id)} is not in {USERS_FILE}; add the user or remove the file")
    user_text = users[row.user_id]["user_text"]
    if row.user_text and user_text and row.user_text != user_text:
        raise DataError(f"{where}: user_text differs from the one in {USERS_FILE}; write it in one place")
    return row if row.user_text else replace(row, user_text=user_text)
