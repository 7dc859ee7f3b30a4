"""The row files of a user store: records of one size in shards, written once and read by position.

Reads are `pread` and not memory maps: they cost the same page cache, a file that lost its end is a short read and not
a killed process, and a table of many gigabytes does not count as this process's memory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from prlhf.errors import CheckpointError

MAX_OPEN_FILES = 128


class RowShards:
    """Records by slot: slot s is record s % rows_per_shard of shard s // rows_per_shard.

    A shard is `tail-NNNNNN.bin` while it is filled and `rows-NNNNNN-<sha256>.bin` once it is full. Which slots count
    and which shards are full is the caller's to remember; what lies beyond them is overwritten by the next write.

    Args:
        finished: sha256 of each full shard, by number.
    """

    def __init__(
        self, directory: Path, *, record_bytes: int, rows_per_shard: int, finished: dict[int, str]
    ) -> None:
        self.directory = directory
        self.record_bytes = record_bytes
        self.rows_per_shard = rows_per_shard
        self.finished = finished
        self._files: dict[int, int] = {}

    def path(self, number: int) -> Path:
        """Where a shard is."""
        digest = self.finished.get(number)
        return self._tail(number) if digest is None else self._full(number, digest)

    def sizes(self, num_slots: int) -> dict[int, int]:
        """Bytes of each shard, by number, that the first `num_slots` slots take."""
        full, rest = divmod(num_slots, self.rows_per_shard)
        sizes = dict.fromkeys(range(full), self.rows_per_shard * self.record_bytes)
        return {**sizes, full: rest * self.record_bytes} if rest else sizes

    def check_sizes(self, num_slots: int) -> None:
        """Refuse a shard that is missing or has lost its end; a longer tail is a write that was never committed.

        Raises: CheckpointError: naming the first such shard.
        """
        for number, size in self.sizes(num_slots).items():
            path = self.path(number)
            if path.is_symlink() or not path.is_file():
                raise CheckpointError(f"{path}: missing, or no plain file; use another checkpoint")
            if path.stat().st_size < size:
                raise CheckpointError(
                    f"{path}: {path.stat().st_size} bytes, expected {size}; use another checkpoint"
                )

    def read(self, slot: int, offset: int, num_bytes: int) -> bytes:
        """Bytes of a record; fewer where the file ends early."""
        number, row = divmod(slot, self.rows_per_shard)
        if number not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                self.close()
            self._files[number] = _open(self.path(number), os.O_RDONLY)
        return os.pread(self._files[number], num_bytes, row * self.record_bytes + offset)

    def append(self, slot: int, records: bytes) -> dict[int, str]:
        """Write records from `slot` on and flush them; returns the sha256 of each shard that became full.

        A full shard has both its names until `finish`, so that a crash before the caller's commit changes nothing.
        """
        full = {}
        remaining = memoryview(records)
        is_new_file = False
        while remaining:
            number, row = divmod(slot, self.rows_per_shard)
            is_new_file |= row == 0
            part = remaining[: (self.rows_per_shard - row) * self.record_bytes]
            _write(self._tail(number), row * self.record_bytes, part)
            remaining = remaining[len(part) :]
            slot += len(part) // self.record_bytes
            if slot % self.rows_per_shard == 0:
                full[number] = sha256_of(self._tail(number))
                _link(self._tail(number), self._full(number, full[number]))
        if is_new_file or full:
            flush_directory(self.directory)
        return full

    def erase(self, slots: list[int]) -> dict[int, str]:
        """Overwrite records with zeros in place, hence in every hard link; returns the full shards' new sha256."""
        changed = {}
        for number in sorted({slot // self.rows_per_shard for slot in slots}):
            for slot in slots:
                if slot // self.rows_per_shard == number:
                    row = slot % self.rows_per_shard
                    _write(self.path(number), row * self.record_bytes, memoryview(bytes(self.record_bytes)))
            if number in self.finished:
                changed[number] = sha256_of(self.path(number))
                if changed[number] != self.finished[number]:
                    _link(self.path(number), self._full(number, changed[number]))
        flush_directory(self.directory)
        return changed

    def finish(self, digests: dict[int, str]) -> None:
        """Let full shards go by their new names, once those are committed."""
        for number, digest in digests.items():
            old = self.path(number)
            self.finished[number] = digest
            if old != self.path(number):
                old.unlink(missing_ok=True)

    def remove_strays(self, num_slots: int) -> None:
        """Delete what writes that were never committed left behind."""
        kept = {self.path(number) for number in self.sizes(num_slots)}
        for pattern in ("tail-*.bin", "rows-*.bin"):
            for path in self.directory.glob(pattern):
                if path not in kept:
                    path.unlink()

    def link_into(
        self, directory: Path, num_slots: int, *, apart: Collection[int] = ()
    ) -> dict[str, tuple[int, str]]:
        """Hard-link full shards and copy the one that is being filled; returns size and sha256 by name.

        Args:
            apart: slots whose shards are copied, too.
        """
        copied = {slot // self.rows_per_shard for slot in apart}
        files = {}
        for number, size in self.sizes(num_slots).items():
            source = self.path(number)
            target = directory / source.name
            if number in self.finished and number not in copied:
                _link_or_copy(source, target)
            else:
                shutil.copyfile(source, target)
                os.truncate(target, size)
            files[target.name] = (size, self.finished.get(number) or sha256_of(target))
        return files

    def close(self) -> None:
        """Close every file; a later read opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _tail(self, number: int) -> Path:
        return self.directory / f"tail-{number:06d}.bin"

    def _full(self, number: int, digest: str) -> Path:
        return self.directory / f"rows-{number:06d}-{digest}.bin"


def flush_directory(directory: Path) -> None:
    """Flush a directory's entries to the disk."""
    descriptor = _open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; use another checkpoint") from None


def _write(path: Path, offset: int, data: memoryview) -> None:
    descriptor = _open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # left by a write that was never committed
    os.link(source, target)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
