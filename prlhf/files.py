"""Files that survive a crash: written beside their place, flushed, renamed; directories sealed by a manifest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prlhf.errors import CheckpointError, DataError, RunDirError

MANIFEST = "manifest.json"
MAX_NAME_BYTES = 200  # most disks take 255, of which a temporary name beside it takes some


def fsync_path(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """As write_text_atomic, of indented JSON."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in a file of ours.

    Raises: CheckpointError: missing or malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a checkpoint directory or a run directory") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); use another checkpoint") from None


def read_json_lines(path: Path) -> list[Any]:
    """The JSON objects of a file of ours, one a line; texts may hold what `str.splitlines` takes for an end of line.

    Raises: DataError: missing, unreadable, or a line that is none, such as half of one.
    """
    remedy = "get the file anew, or train again"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from None
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line) if line else {}
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}); {remedy}") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: is no JSON object; {remedy}")
        if line:
            values.append(value)
    return values


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def seal_directory(directory: Path, known: Mapping[str, tuple[int, str]] | None = None) -> None:
    """Flush every file and write the manifest (size and sha256 of each) last.

    Args:
        known: size and sha256 of files that were flushed before, by their name below the directory; they are not read.
    """
    known, entries = known or {}, {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name == MANIFEST:
            continue
        if name not in known:
            fsync_path(path)
        if path.is_file():
            size, digest = known.get(name) or (path.stat().st_size, sha256_of(path))
            entries[name] = {"size": size, "sha256": digest}
    write_text_atomic(directory / MANIFEST, _manifest_text(entries))


def _manifest_text(entries: Any) -> str:
    return json.dumps({"files": entries}, indent=2, ensure_ascii=False) + "\n"


def find_damage(directory: Path, *, by_size: str | None = None) -> list[str]:
    """What is wrong with a sealed directory, one line a file; empty when every byte is as it was sealed.

    Args:
        by_size: files like this pattern are not read: whoever reads a part of one checks that.
    """
    try:
        text = (directory / MANIFEST).read_text(encoding="utf-8")
        entries = json.loads(text)["files"]
        if text != _manifest_text(entries):  # nothing else vouches for this file
            raise ValueError
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{directory / MANIFEST}: missing or malformed"]
    damage = []
    for name, (size, digest) in expected.items():
        path = directory / name
        if Path(name).is_absolute() or path.resolve() != directory.resolve() / name:
            damage.append(f"{path}: not a plain file of this directory")
        elif not path.is_file():
            damage.append(f"{path}: missing")
        elif path.stat().st_size != size:
            damage.append(f"{path}: {path.stat().st_size} bytes, expected {size}")
        elif not (by_size and fnmatchcase(name, by_size)) and sha256_of(path) != digest:
            damage.append(f"{path}: content changed (sha256 differs)")
    return damage


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the disk has no hard links or is another one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_can_appear(path: Path) -> None:
    """Refuse, before any work, a file or directory to be written where none can be.

    Raises: RunDirError: no name for one, or a file in the place of a folder.
    """
    path = path.absolute()
    longest = max(len(os.fsencode(part)) for part in path.parts)
    if longest > MAX_NAME_BYTES:
        raise RunDirError(f"{path}: has a name of {longest} bytes; choose one of {MAX_NAME_BYTES}")
    above = next(parent for parent in path.parents if parent.exists())
    if not path.name or not above.is_dir():
        raise RunDirError(f"{path}: cannot be written, as {above} is no folder; choose another path")


def make_place(path: Path, *, reads: Path | None = None) -> None:
    """Make the folder of a file to be written, before any work.

    Args:
        reads: the file that it is made from.
    Raises: RunDirError: a folder or the file to be read is in the file's place, or no folder can be made for it or
        written to.
    """
    if reads is not None and path.exists() and reads.exists() and path.samefile(reads):
        raise RunDirError(f"{path}: is the file that is read; write to another one")
    check_can_appear(path)
    if path.is_dir():
        raise RunDirError(f"{path}: is a folder; give a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise RunDirError(f"{path}: cannot be written, as {path.parent} is read-only for you; choose another path")


def publish_directory(temporary: Path, final: Path) -> None:
    """Rename a sealed directory into its place and flush the parent.

    safetensors makes its files its owner's alone; they get the rights that any new file has.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in temporary.rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)
    temporary.rename(final)
    fsync_path(final.parent)


@contextlib.contextmanager
def writing_directory(final: Path) -> Iterator[Path]:
    """Inside, a new directory beside the final one, to fill and publish; what is not published is gone at the end.

    One process at a time writes a directory; what killed ones left of it goes first.

    Raises: RunDirError: another process is writing it.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with lock_beside(final):
        remove_temporaries(final)
        temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
        try:
            temporary.mkdir()
            yield temporary
        finally:
            remove_directories([temporary])


def find_temporaries(final: Path) -> list[Path]:
    """Directories that `writing_directory` made for a final one and that are still there."""
    return find_beside(final, "tmp")


def find_beside(final: Path, mark: str) -> list[Path]:
    """Directories `.NAME.MARK-PID` beside the final one, of any process."""
    start = f".{final.name}.{mark}-"
    beside = final.parent.iterdir() if final.parent.is_dir() else ()
    return [
        path for path in beside
        if path.name.startswith(start) and path.name.removeprefix(start).isdecimal() and path.is_dir()
    ]


def remove_temporaries(final: Path) -> None:
    """Delete what killed processes left of a directory that they were writing; call it under `lock_beside`."""
    remove_directories(find_temporaries(final))


def remove_directories(directories: Iterable[Path]) -> None:
    """Delete directories with all they hold; one that is gone already is no error."""
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def writing_tensors(path: Path) -> Iterator[None]:
    """Inside, safetensors' own error of a disk that takes no more is a line that says so.

    Raises: RunDirError: the disk is full or unwritable.
    """
    try:
        yield
    except SafetensorError as error:
        raise RunDirError(f"{path}: cannot be written ({error}); make room, or write to another folder") from None


class LockFile:
    """A file that one process at a time holds; it is removed when it is let go of.

    Args:
        guards: what the lock is for, as messages name it.
        remedy: what to do while another process holds it.
    """

    def __init__(self, path: Path, guards: Path, *, remedy: str = "wait for it") -> None:
        self.path = path
        self.guards = guards
        self.remedy = remedy

    def __enter__(self) -> LockFile:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Hold the lock.

        Raises: RunDirError: another process holds it. OSError: the file cannot be written.
        """
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise RunDirError(f"{self.guards}: in use by {holder}; {self.remedy}") from None
        if not self._is_in_place():
            self._file.close()
            raise RunDirError(f"{self.guards}: another process is just letting go of it; try again")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}")
        self._file.flush()

    def _is_in_place(self) -> bool:
        """Whether the locked file is the one of that name: who held it before removes it in the end."""
        return self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))

    def release(self) -> None:
        """Let go."""
        self.path.unlink(missing_ok=True)
        self._file.close()


def lock_beside(directory: Path) -> LockFile:
    """The lock of a directory that is written or replaced as a whole, and with it what is inside."""
    return LockFile(directory.with_name(f".lock-{directory.name}"), directory)
