"""Taking one user out of JSON files: an id counts where an id stands, for it may be any word, also one of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from prlhf.files import fsync_path

BY_USER = ("per_user", "per_unseen_user", "on_side")  # what evaluations map from user ids


def scrub(value: Any, user_id: str) -> tuple[Any, int]:
    """A JSON value without a user's entries in maps by user, and without the records about the user in lists.

    Returns: the value, and how many such parts were taken out.
    """
    if isinstance(value, dict):
        count, kept = 0, {}
        for key, item in value.items():
            if key in BY_USER and isinstance(item, dict) and user_id in item:
                item = {user: own for user, own in item.items() if user != user_id}
                count += 1
            kept[key], inside = scrub(item, user_id)
            count += inside
        return kept, count
    if isinstance(value, list):
        members = [item for item in value if not is_about(item, user_id)]
        scrubbed = [scrub(item, user_id) for item in members]
        return [item for item, _ in scrubbed], len(value) - len(members) + sum(inside for _, inside in scrubbed)
    return value, 0


def is_about(record: Any, user_id: str) -> bool:
    """Whether a record is about a user, by its field `user_id`."""
    return isinstance(record, dict) and record.get("user_id") == user_id


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value but keys, ids and the roles of turns."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("user_id", "pair_id", "role"):
                yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def scrub_line(line: bytes, user_id: str, texts: Collection[str]) -> bytes | None:
    """A line of a .jsonl file without a user, byte for byte as it was where it does not name the user.

    Args:
        texts: strings that mark the line as the user's, too.
    Returns: None when the line goes: a record about the user, or a broken line in which the id can be read.
    """
    try:
        record = json.loads(line)
    except ValueError:
        return None if any(quoted in line for quoted in _quoted(user_id)) else line
    if is_about(record, user_id) or (texts and not set(texts).isdisjoint(strings(record))):
        return None
    kept, count = scrub(record, user_id)
    return json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n" if count else line


def drop_row(line: bytes, user_id: str) -> bytes | None:
    """A line of training data, or None when it is a row of the user's; other rows may hold the id as a text."""
    try:
        record = json.loads(line)
    except ValueError:
        return line
    return None if is_about(record, user_id) else line


def _quoted(user_id: str) -> tuple[bytes, bytes]:
    plain = json.dumps(user_id, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return json.dumps(user_id).encode("ascii"), plain


def count_changed_lines(path: Path, change: Callable[[bytes], bytes | None]) -> int:
    """Lines of a file that a change would alter."""
    with path.open("rb") as file:
        return sum(change(line) != line for line in file)


def rewrite_lines(path: Path, change: Callable[[bytes], bytes | None]) -> None:
    """Change a file line by line; a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with path.open("rb") as source, temporary.open("wb") as target:
        target.writelines(kept for line in source if (kept := change(line)) is not None)
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(path)
    fsync_path(path.parent)
