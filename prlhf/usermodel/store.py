"""Rows of users on disk, for tables larger than memory: only users that were ever written have one.

A store is a directory: `index.sqlite` (user id -> slot, forgotten users, full shards with their sha256) and the shards
of `shards.py`. A put flushes its rows before the index commits, so what was acknowledged is there after a crash.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from torch import Tensor

from prlhf.errors import CheckpointError, DataError, RunDirError
from prlhf.usermodel.row_layout import CHECK_BYTES, RowField, RowLayout, encode_id, show_id
from prlhf.usermodel.shards import RowShards, flush_directory, sha256_of

INDEX = "index.sqlite"
LOCK = ".lock"
VERSION = 1
SHARD_BYTES = 64 * 2**20
PAGE = 1000  # ids that an iteration reads at a time
SCHEMA = """
CREATE TABLE layout (version INTEGER, fields TEXT, rows_per_shard INTEGER, tombstone_key BLOB);
CREATE TABLE counts (num_users INTEGER, num_slots INTEGER);
CREATE TABLE users (id BLOB PRIMARY KEY, slot INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE older (id BLOB, slot INTEGER, PRIMARY KEY (id, slot)) WITHOUT ROWID;
CREATE TABLE shards (number INTEGER PRIMARY KEY, sha256 TEXT NOT NULL);
CREATE TABLE tombstones (hash BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE erasures (slot INTEGER PRIMARY KEY);
INSERT INTO counts VALUES (0, 0);
"""
SETTINGS = (
    "trusted_schema = OFF",  # a planted index runs nothing
    "secure_delete = ON",  # a deleted id does not stay in free space
    "synchronous = FULL",
    "cache_size = -65536",
)


class UserStore:
    """String user id -> row, and what stands beside it (an optimizer's moments); the last put of a user counts.

    Opening takes constant time. One process writes, any number read. Damage, and another user's row, are refused when
    they are read. Use `create` or `open`.

    Args:
        write: take the store's lock, complete what a crash cut short, and allow `put` and `forget`.
    Raises: CheckpointError: no store, or a damaged one. RunDirError: another process writes, or the disk refuses.
    """

    def __init__(self, directory: Path, *, write: bool) -> None:
        self.directory = directory
        self.writes = write
        if not (directory / INDEX).is_file() or (directory / INDEX).is_symlink():
            raise CheckpointError(f"{directory / INDEX}: no such file; give the directory of a user store")
        with _plain_errors(directory), ExitStack() as resources:
            if write:
                self._take_lock(resources)
            self._db = sqlite3.connect(directory / INDEX, timeout=60, isolation_level=None)
            resources.callback(self._db.close)
            for setting in SETTINGS if write else (*SETTINGS, "query_only = ON"):
                self._db.execute(f"PRAGMA {setting}")
            self._read_layout()
            resources.callback(self._shards.close)
            if write:
                self._finish_erasures()
                self._shards.remove_strays(self._num_slots())
            self._shards.check_sizes(self._num_slots())
            self._resources = resources.pop_all()

    @property
    def fields(self) -> dict[str, RowField]:
        """What each user has: "row", and what stands beside it."""
        return self._layout.fields

    @property
    def num_slots(self) -> int:
        """Rows that were ever put, those that later ones replaced and those that were erased among them."""
        with _plain_errors(self.directory):
            return self._num_slots()

    @classmethod
    def create(
        cls,
        directory: Path,
        fields: Mapping[str, RowField],
        *,
        shard_bytes: int = SHARD_BYTES,
        forgotten: UserStore | None = None,
    ) -> UserStore:
        """An empty store, open for writing, in a directory that has none.

        Args:
            fields: "row", and any others beside it.
            forgotten: a store whose forgotten users this one refuses, too.
        Raises: RunDirError: there is one already, or the disk refuses. ValueError: no "row", or an empty array.
        """
        layout = RowLayout(fields)
        index, unfinished = directory / INDEX, directory / f".{INDEX}.tmp"
        rows_per_shard = max(1, shard_bytes // layout.record_bytes)
        with _plain_errors(directory):
            if index.exists():
                raise RunDirError(f"{directory}: holds a user store already; open it, or choose another directory")
            directory.mkdir(parents=True, exist_ok=True)
            unfinished.unlink(missing_ok=True)
            db = sqlite3.connect(unfinished)
            db.executescript(SCHEMA)
            key = os.urandom(32) if forgotten is None else forgotten._tombstone_key
            db.execute("INSERT INTO layout VALUES (?, ?, ?, ?)", (VERSION, layout.to_json(), rows_per_shard, key))
            if forgotten is not None:
                hashes = forgotten._db.execute("SELECT hash FROM tombstones")
                db.executemany("INSERT INTO tombstones VALUES (?)", hashes)
            db.commit()
            db.close()
            unfinished.rename(index)
            flush_directory(directory)
        return cls(directory, write=True)

    @classmethod
    def open(cls, directory: Path, *, write: bool = False) -> UserStore:
        """A store that is there; see the class."""
        return cls(directory, write=write)

    def close(self) -> None:
        """Let go of the files and the lock; nothing is left to write."""
        self._resources.close()

    def __enter__(self) -> UserStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Users that have a row."""
        with _plain_errors(self.directory):
            return self._value("SELECT num_users FROM counts")

    def __contains__(self, user_id: str) -> bool:
        with _plain_errors(self.directory):
            return self._slot(encode_id(user_id)) is not None

    def __iter__(self) -> Iterator[str]:
        """Every user's id, in the order of its UTF-8 bytes."""
        start: bytes | None = b""
        while start is not None:
            with _plain_errors(self.directory):
                query = "SELECT id FROM users WHERE id >= ? ORDER BY id LIMIT ?"
                page = self._db.execute(query, (start, PAGE)).fetchall()
            yield from (key.decode() for (key,) in page)
            start = page[-1][0] + b"\0" if len(page) == PAGE else None

    def read(self, user_ids: Sequence[str], field: str = "row") -> Tensor:
        """One array of each user, (N, ...) of the field's type.

        Raises: DataError: a user without a row. CheckpointError: bytes that are not what was put.
        """
        keys = [encode_id(user_id) for user_id in user_ids]
        with self._transaction("DEFERRED"):  # while it lasts no other process erases or renames anything
            self._notice_new_shards()
            slots = [self._slot(key) for key in keys]
            if None in slots:
                missing = user_ids[slots.index(None)]
                raise DataError(f"{self.directory}: no row of user {show_id(missing)}; give a user of the store")
            return self._read_slots(keys, [slot for slot in slots if slot is not None], field)

    def put(self, user_ids: Sequence[str], rows: Tensor, **beside: Tensor) -> None:
        """Write users' arrays, all of them or none; once this returns, no crash undoes it.

        Args:
            user_ids: N different ids; new ones, or known ones whose row this replaces.
            rows: (N, ...), of the type of "row".
            beside: (N, ...) of other fields; a field that is not given is zero.
        Raises: DataError: a user twice, or one that was forgotten. RunDirError: not open for writing, or the disk
            refuses. ValueError: another shape or type than the store's, or an unknown field.
        """
        self._check_writable()
        keys = [encode_id(user_id) for user_id in user_ids]
        if len(set(keys)) < len(keys):
            raise DataError(f"{self.directory}: a user twice in one put; give each once")
        records = self._layout.pack(keys, {"row": rows, **beside})
        with self._transaction("IMMEDIATE"):
            self._refuse_forgotten(keys)
            first = self._num_slots()
            full = self._shards.append(first, records)
            # In the order of the index, so that each of its pages is read and written once.
            slots = sorted(zip(keys, range(first, first + len(keys)), strict=True))
            replace = self._db.executemany(
                "INSERT INTO older SELECT id, slot FROM users WHERE id = ?", ((key,) for key, _ in slots)
            )
            self._db.executemany(
                "INSERT INTO users VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET slot = excluded.slot", slots
            )
            self._db.execute(
                "UPDATE counts SET num_users = num_users + ?, num_slots = num_slots + ?",
                (len(keys) - max(0, replace.rowcount), len(keys)),
            )
            self._db.executemany("INSERT INTO shards VALUES (?, ?)", full.items())
        self._shards.finish(full)

    def forget(self, user_id: str) -> int:
        """Erase a user: the id, and the bytes of every row that was ever put; a later put of the id is refused.

        What stays is a keyed hash of the id. Rows are overwritten in place, so they are gone from every directory that
        shares the shard; each of those must forget the user too, to drop the id and learn the shard's new sha256. What
        a crash cuts short, the next opening for writing completes.

        Returns: erased rows, 0 for a user that has none.
        """
        self._check_writable()
        key = encode_id(user_id)
        with self._transaction("IMMEDIATE"):
            slots = self._all_slots(key)
            self._db.execute("INSERT OR IGNORE INTO tombstones VALUES (?)", (self._tombstone(key),))
            self._db.executemany("INSERT INTO erasures VALUES (?)", ((slot,) for slot in slots))
            known = self._db.execute("DELETE FROM users WHERE id = ?", (key,)).rowcount
            self._db.execute("DELETE FROM older WHERE id = ?", (key,))
            self._db.execute("UPDATE counts SET num_users = num_users - ?", (known,))
        with _plain_errors(self.directory):
            self._finish_erasures()
        return len(slots)

    def is_forgotten(self, user_id: str) -> bool:
        """Whether `forget` was told this id."""
        with _plain_errors(self.directory):
            return self._has_tombstone(encode_id(user_id))

    def link_into(self, directory: Path, *, apart: str | None = None) -> dict[str, tuple[int, str]]:
        """This store as it is now, in another directory that has none: full shards hard-linked, the rest copied.

        Args:
            apart: a user whose shards are copied, too, so that to forget the user there changes nothing here.
        Returns: size and sha256 of each file by name; full shards are not read for it.
        """
        with self._transaction("DEFERRED"), _plain_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._notice_new_shards()
            slots = [] if apart is None else self._all_slots(encode_id(apart))
            files = self._shards.link_into(directory, self._num_slots(), apart=slots)
            copy = sqlite3.connect(directory / INDEX)
            self._db.backup(copy)
            copy.close()
        files[INDEX] = ((directory / INDEX).stat().st_size, sha256_of(directory / INDEX))
        return files

    def full_shards(self) -> dict[str, tuple[int, str]]:
        """Size and sha256 of each file that no put changes any more, by name."""
        size = self._shards.rows_per_shard * self._layout.record_bytes
        return {self._shards.path(number).name: (size, digest) for number, digest in self._shards.finished.items()}

    def find_damage(self) -> list[str]:
        """What is wrong, one line each, after reading every byte; empty when all is as it was put."""
        with self._transaction("DEFERRED"):
            self._notice_new_shards()
            state = self._value("PRAGMA quick_check(1)")
            damage = [] if state == "ok" else [f"{self.directory / INDEX}: {state}"]
            for number, digest in self._shards.finished.items():
                if sha256_of(self._shards.path(number)) != digest:
                    damage.append(f"{self._shards.path(number)}: content changed (sha256 differs)")
            num_users = 0
            for key, slot in self._db.execute("SELECT id, slot FROM users"):
                num_users += 1
                try:
                    for field in self._layout.fields:
                        self._read_slots([key], [slot], field)
                except CheckpointError as error:
                    damage += error.messages
            if num_users != len(self):
                damage.append(f"{self.directory / INDEX}: holds {num_users} users and counts {len(self)}")
        return damage

    def _read_layout(self) -> None:
        version, fields, rows_per_shard, self._tombstone_key = self._db.execute("SELECT * FROM layout").fetchone()
        if version != VERSION:
            raise CheckpointError(f"{self.directory}: written by another version of prlhf (store {version}); use that")
        try:
            self._layout = RowLayout.from_json(fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.directory / INDEX}: damaged ({error}); use another checkpoint") from None
        self._shards = RowShards(
            self.directory, record_bytes=self._layout.record_bytes, rows_per_shard=rows_per_shard, finished={}
        )
        self._seen_version = -1
        self._notice_new_shards()

    def _notice_new_shards(self) -> None:
        """Read the list of full shards when another process may have changed it."""
        version = self._value("PRAGMA data_version")
        if version == self._seen_version:
            return
        finished = dict(self._db.execute("SELECT number, sha256 FROM shards"))
        if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in finished.values()):
            raise CheckpointError(f"{self.directory / INDEX}: names a file that is no shard; use another checkpoint")
        self._shards.finished, self._seen_version = finished, version

    def _read_slots(self, keys: list[bytes], slots: list[int], field: str) -> Tensor:
        offset, size = self._layout.offsets[field], self._layout.fields[field].num_bytes + CHECK_BYTES
        parts = [self._shards.read(slot, offset, size) for slot in slots]
        try:
            return self._layout.unpack(field, keys, parts)
        except ValueError as error:
            index = error.args[0]
            path = self._shards.path(slots[index] // self._shards.rows_per_shard)
            user = show_id(keys[index].decode(errors="replace"))
            raise CheckpointError(f"{path}: {field} of user {user}: damaged; use another checkpoint") from None

    def _finish_erasures(self) -> None:
        slots = [slot for (slot,) in self._db.execute("SELECT slot FROM erasures ORDER BY slot")]
        if not slots:
            return
        changed = self._shards.erase(slots)
        with self._transaction("IMMEDIATE"):
            updates = [(digest, number) for number, digest in changed.items()]
            self._db.executemany("UPDATE shards SET sha256 = ? WHERE number = ?", updates)
            self._db.execute("DELETE FROM erasures")
        self._shards.finish(changed)

    def _refuse_forgotten(self, keys: list[bytes]) -> None:
        if self._value("SELECT EXISTS (SELECT * FROM tombstones)"):
            for key in keys:
                if self._has_tombstone(key):
                    raise DataError(f"{self.directory}: user {show_id(key.decode())} was forgotten; use another id")

    def _has_tombstone(self, key: bytes) -> bool:
        return bool(self._value("SELECT EXISTS (SELECT * FROM tombstones WHERE hash = ?)", self._tombstone(key)))

    def _tombstone(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._tombstone_key, digest_size=32).digest()

    def _slot(self, key: bytes) -> int | None:
        found = self._db.execute("SELECT slot FROM users WHERE id = ?", (key,)).fetchone()
        return None if found is None else found[0]

    def _all_slots(self, key: bytes) -> list[int]:
        query = "SELECT slot FROM users WHERE id = ?1 UNION ALL SELECT slot FROM older WHERE id = ?1"
        return [slot for (slot,) in self._db.execute(query, (key,))]

    def _num_slots(self) -> int:
        return self._value("SELECT num_slots FROM counts")

    def _value(self, query: str, *values: Any) -> Any:
        return self._db.execute(query, values).fetchone()[0]

    def _check_writable(self) -> None:
        if not self.writes:
            raise RunDirError(f"{self.directory}: open for reading; open it with write=True")

    def _take_lock(self, resources: ExitStack) -> None:
        lock = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        resources.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 200).decode(errors="replace") or "another process"
            raise RunDirError(f"{self.directory}: being written by {holder}; wait for it") from None
        os.truncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {platform.node()}".encode(), 0)

    @contextmanager
    def _transaction(self, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[None]:
        with _plain_errors(self.directory):
            self._db.execute(f"BEGIN {kind}")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


@contextmanager
def _plain_errors(directory: Path) -> Iterator[None]:
    """Say in one line what the disk or SQLite report.

    Raises: RunDirError: the disk refuses. CheckpointError: the index is damaged.
    """
    try:
        yield
    except OSError as error:
        raise RunDirError(f"{directory}: {error.strerror}; make room, or give another directory") from None
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "no such" not in str(error):
            raise RunDirError(f"{directory / INDEX}: {error}; make room, or wait for who else uses it") from None
        raise CheckpointError(f"{directory / INDEX}: damaged ({error}); use another checkpoint") from None
