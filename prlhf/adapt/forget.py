"""Forgetting a user: everything that is the user's alone goes, in steps that may be interrupted and taken again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prlhf.adapt.checkpoint_rows import (
    RECEIPT,
    check_cleanable,
    compares_data,
    count_twins,
    find_user,
    finish_rename,
    finish_renames,
    has_begun_rename,
    remove_user,
)
from prlhf.adapt.scrub import count_changed_lines, drop_row, rewrite_lines, scrub, scrub_line, strings
from prlhf.data.jsonl import read_jsonl
from prlhf.data.prepared import USERS_FILE
from prlhf.data.quoting import quote
from prlhf.data.user_index import GENERIC
from prlhf.engine.checkpoint import CONFIG, remove_stale_temporaries
from prlhf.engine.run_dir import LOCK, STATUS
from prlhf.engine.tombstones import Tombstones
from prlhf.errors import CheckpointError, DataError
from prlhf.files import LockFile, find_temporaries, lock_beside, read_json, remove_temporaries, write_json_atomic
from prlhf.models.assemble import CONTEXTS, USER_TEXTS
from prlhf.models.run_folder import STATE

REMAINS = (
    "Shared weights (adapters or backbone, the generic soft prompt, clusters, an encoder) that were trained on the "
    "user's rows keep their influence; training anew without the rows removes it. A user added by prlhf adapt leaves "
    "none: it changes no shared weight.",
    "Means over users and rows in metrics and evaluations were taken with the user; prlhf eval takes them anew.",
    "Copies: other runs, adapted checkpoints made from this one, exports, reports written elsewhere, backups, and disk "
    "blocks that are freed but not overwritten.",
)
TWINS = (
    "The user's very row: {count} it, as prlhf adapt gives who is like a known user that one's row. What was learned "
    "of the user serves them on; forget them, too, or adapt them anew."
)
OF_DATA = "data: "  # before what goes from --data
DATA_REMAINS = "The data that the user's rows came from; a resumed run refuses it (--data DIR takes them out)."


@dataclass(frozen=True)
class Step:
    """One removal: what goes, in words without the id, and the call that does it, at once or not at all."""

    what: str
    do: Callable[[], None]


def forget_user(directory: Path, user_id: str, *, data: Path | None = None) -> dict[str, Any]:
    """Take a user out of a run, a checkpoint or an adapted checkpoint; called again, finish what was interrupted.

    Args:
        data: a prepared directory or .jsonl file from which the user's rows go, too.
    Returns: the receipt, also written as `forgotten-*.json`: what was removed, and what cannot be.
    Raises: DataError: the user is nowhere here. CheckpointError: neither run nor checkpoint, a damaged checkpoint, or
        the model's only user. RunDirError: the run is in use.
    """
    directory = directory.resolve()  # a link stays, and what it names is cleaned
    is_checkpoint = (directory / STATE).is_file() or has_begun_rename(directory)
    _check_target(directory, user_id, is_checkpoint=is_checkpoint)
    # A checkpoint is replaced as a whole, and with it a lock inside.
    with lock_beside(directory) if is_checkpoint else LockFile(directory / LOCK, directory):
        _clear_leftovers(directory, is_checkpoint=is_checkpoint)
        tombstones = Tombstones(directory)
        tag = tombstones.tag(user_id)
        known = tombstones.entries.get(tag)
        begun = known is not None and known["finished"] is None
        steps = _plan(directory, user_id, data, is_checkpoint=is_checkpoint, begun=begun)
        if not steps and known is None:
            raise DataError(f"{directory}: holds nothing of this user; check the id, which must match as a whole")
        report = directory / "report.html"
        if steps and report.is_file():
            steps.insert(0, Step(report.name, report.unlink))
        if steps or begun:
            tombstones.bury(tag, twins=_count_twins(directory, user_id, is_checkpoint=is_checkpoint))
            for step in steps:
                tombstones.note(tag, step.what)
                step.do()
            _write_receipt(directory, tombstones, tag)
        return read_json(_receipt_path(directory, tag))


def _check_target(directory: Path, user_id: str, *, is_checkpoint: bool) -> None:
    if not is_checkpoint and not (directory / CONFIG).is_file():
        if find_temporaries(directory):
            with lock_beside(directory):
                remove_temporaries(directory)
            raise CheckpointError(f"{directory}: was never finished, and what killed processes left of it is removed")
        raise CheckpointError(f"{directory}: neither a run nor a checkpoint; give runs/NAME or what prlhf adapt wrote")
    run = directory.parent.parent
    if is_checkpoint and directory.parent.name == "checkpoints" and (run / CONFIG).is_file():
        raise CheckpointError(f"{directory}: a checkpoint of a run, whose others would keep the user; give {run}")
    if user_id == GENERIC:
        raise DataError(f"user {quote(GENERIC)}: names the generic user, who is nobody; give the id of one user")


def _clear_leftovers(directory: Path, *, is_checkpoint: bool) -> None:
    """What killed processes left: renames of an earlier call, half-written files, checkpoints and adapted models."""
    if is_checkpoint:
        finish_rename(directory)
        remove_temporaries(directory)
    else:
        finish_renames(directory / "checkpoints")
        remove_stale_temporaries(directory)
    for folder in (directory, directory / "eval", directory / "samples"):
        for path in folder.glob(".*.tmp-*"):
            if path.is_file():
                path.unlink()


def _plan(
    directory: Path, user_id: str, data: Path | None, *, is_checkpoint: bool, begun: bool
) -> list[Step]:
    """Files of the run first: the checkpoints and the data tell which texts in them are the user's."""
    checkpoints = _checkpoints(directory, is_checkpoint=is_checkpoint)
    found = {checkpoint: find_user(checkpoint, user_id) for checkpoint in checkpoints}
    sources = _data_files(data)
    steps: list[Step] = []
    if not is_checkpoint:
        change = partial(scrub_line, user_id=user_id, texts=_own_texts(checkpoints, sources, user_id))
        for path in _run_files(directory):
            steps += _plan_file(path, str(path.relative_to(directory)), user_id, change)
    from_data = [
        step
        for path in sources
        for step in _plan_file(path, f"{OF_DATA}{path.name}", user_id, partial(drop_row, user_id=user_id))
    ]
    begun = bool(begun or steps or from_data)
    for checkpoint, files in found.items():
        # A model without users holds none, but what it was trained on must change all the same.
        if files or (begun and compares_data(checkpoint)):
            check_cleanable(checkpoint)
            what = ", ".join(files) or "the training data's hash in state.json"
            where = "" if is_checkpoint else f"{checkpoint.name}: "
            steps.append(Step(f"{where}the user's part of {what}", partial(remove_user, checkpoint, user_id)))
    return steps + from_data


def _checkpoints(directory: Path, *, is_checkpoint: bool) -> list[Path]:
    return [directory] if is_checkpoint else sorted((directory / "checkpoints").glob("step-[0-9]*"))


def _count_twins(directory: Path, user_id: str, *, is_checkpoint: bool) -> int:
    return max((count_twins(path, user_id) for path in _checkpoints(directory, is_checkpoint=is_checkpoint)), default=0)


def _run_files(directory: Path) -> list[Path]:
    """A run's files but its checkpoints, and rows that lie beside; other models in its folder are left alone."""
    patterns = (STATUS, "*.jsonl", "eval/*.json", "samples/*.jsonl")
    return sorted(path for pattern in patterns for path in directory.glob(pattern))


def _plan_file(
    path: Path, where: str, user_id: str, change: Callable[[bytes], bytes | None]
) -> Iterator[Step]:
    if path.suffix == ".jsonl":
        count = count_changed_lines(path, change)
        if count:
            yield Step(f"{where}: {count} lines", partial(rewrite_lines, path, change))
        return
    value = read_json(path)
    if path.name == USERS_FILE:
        value, count = {user: item for user, item in value.items() if user != user_id}, int(user_id in value)
    elif path.name == STATUS and quote(user_id) in str(value.get("error", "")):
        value, count = {key: item for key, item in value.items() if key != "error"}, 1
    else:
        value, count = scrub(value, user_id)
    if count:
        yield Step(f"{where}: {count} entries", partial(write_json_atomic, path, value))


def _data_files(data: Path | None) -> list[Path]:
    """Files with rows of users.

    Raises: DataError: nothing to take rows out of, or a line that is no JSON.
    """
    if data is None:
        return []
    files = [data] if data.suffix == ".jsonl" else [*sorted(data.glob("*.jsonl")), *data.glob(USERS_FILE)]
    if not files or not all(path.is_file() for path in files):
        raise DataError(f"--data {data}: neither a prepared directory nor a .jsonl file; give where the rows are")
    for path in files:
        if path.suffix == ".jsonl":
            deque(read_jsonl(path), maxlen=0)  # a line that cannot be read may be the user's
    return files


def _own_texts(checkpoints: Iterable[Path], data: Iterable[Path], user_id: str) -> frozenset[str]:
    """Texts that stand in the user's rows, and in what checkpoints keep of the user, and in nobody else's."""
    contexts = [checkpoint / name for checkpoint in checkpoints for name in (CONTEXTS, USER_TEXTS)]
    rows = [path for path in data if path.suffix == ".jsonl"]
    own: set[str] = set()
    for mine in (True, False):
        for path in filter(Path.is_file, contexts):
            for user, facts in read_json(path).items():
                if (user == user_id) == mine:
                    own = _changed(own, strings(facts), mine)
        for path in rows:
            for _, record in read_jsonl(path):
                if (record.get("user_id") == user_id) == mine:
                    own = _changed(own, strings(record), mine)
    return frozenset(text for text in own if len(text) > 1)


def _changed(own: set[str], found: Iterable[str], mine: bool) -> set[str]:
    return own.union(found) if mine else own.difference(found)


def _receipt_path(directory: Path, tag: str) -> Path:
    return directory / RECEIPT.format(tag=tag[:16])


def _write_receipt(directory: Path, tombstones: Tombstones, tag: str) -> None:
    removed, twins = tombstones.entries[tag]["removed"], tombstones.entries[tag].get("twins", 0)
    same = [TWINS.format(count="1 other user has" if twins == 1 else f"{twins} other users have")] if twins else []
    remains = [*REMAINS, *same, *([] if any(what.startswith(OF_DATA) for what in removed) else [DATA_REMAINS])]
    receipt = {"tombstone": tag, "removed": removed, "remains": remains}
    write_json_atomic(_receipt_path(directory, tag), receipt)
    tombstones.finish(tag)


def format_receipt(receipt: dict[str, Any]) -> str:
    """The receipt for the terminal."""
    lines = [f"forgotten, tombstone {receipt['tombstone'][:16]}; removed:"]
    lines += [f"  {what}" for what in receipt["removed"]]
    lines += ["what cannot be removed here:", *(f"  {what}" for what in receipt["remains"])]
    return "\n".join(lines) + "\n"
