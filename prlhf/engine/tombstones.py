"""Who must not come back: keyed hashes of forgotten ids, and what was removed; never an id."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prlhf.errors import DataError, RunDirError
from prlhf.files import read_json, write_json_atomic

TOMBSTONES = "tombstones.json"


class Tombstones:
    """The tombstones of a run or checkpoint directory; every change is on the disk before the call returns.

    The key is the directory's own: equal ids have unequal hashes elsewhere. It lies beside the hashes, so whoever has
    the file can try an id they guess.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / TOMBSTONES
        new: dict[str, Any] = {"key": secrets.token_hex(32), "forgotten": {}}
        stored = read_json(self.path) if self.path.is_file() else new
        self._key: str = stored["key"]
        self.entries: dict[str, dict[str, Any]] = stored["forgotten"]

    def tag(self, user_id: str) -> str:
        """HMAC-SHA256 of an id, in hex."""
        return hmac.new(bytes.fromhex(self._key), user_id.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    def bury(self, tag: str, *, twins: int = 0) -> None:
        """Set a tombstone; it stays unfinished until `finish`.

        Args:
            twins: other users who have the user's very row; a later call, which no longer sees it, takes none away.
        """
        entry = self.entries.setdefault(tag, {"removed": []})
        entry["finished"] = None
        if twins > entry.get("twins", 0):
            entry["twins"] = twins
        self._write()

    def note(self, tag: str, removed: str) -> None:
        """Add to what is removed, before it is."""
        if removed not in self.entries[tag]["removed"]:
            self.entries[tag]["removed"].append(removed)
            self._write()

    def finish(self, tag: str) -> None:
        """Nothing that can be removed is left."""
        self.entries[tag]["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._write()

    def _write(self) -> None:
        write_json_atomic(self.path, {"key": self._key, "forgotten": self.entries})


def find_forgotten(directories: Iterable[Path], user_ids: Iterable[str]) -> set[str]:
    """Those of the users of whom one of the directories has a tombstone."""
    users, found = list(user_ids), set()
    for directory in directories:
        tombstones = Tombstones(directory)
        found |= {user_id for user_id in users if tombstones.tag(user_id) in tombstones.entries}
    return found


def refuse_forgotten(directories: Iterable[Path], user_ids: Iterable[str]) -> None:
    """Refuse data that holds forgotten users, and directories that are half cleaned.

    Raises: RunDirError: a forgetting was interrupted. DataError: naming the tombstones, not the ids.
    """
    users = set(user_ids)
    messages = []
    for directory in directories:
        tombstones = Tombstones(directory)
        if any(entry["finished"] is None for entry in tombstones.entries.values()):
            raise RunDirError(f"{directory}: a user is being forgotten and the work was cut short; "
                              "call prlhf forget again with the same user")
        found = {tombstones.tag(user_id) for user_id in users} & tombstones.entries.keys() if tombstones.entries else ()
        messages += [
            f"{tombstones.path}: the data holds the user of tombstone {tag[:16]}, who was forgotten; take the user's "
            "rows out of the data (prlhf forget has --data), or start a run of another name"
            for tag in sorted(found)
        ]
    if messages:
        raise DataError(*messages)
