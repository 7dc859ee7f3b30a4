"""A checkpoint without one of its users: the other rows stay bitwise, and the directory changes in one rename."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prlhf.adapt.scrub import scrub
from prlhf.engine.checkpoint import OPTIMIZER
from prlhf.engine.optim import ROW_TABLES
from prlhf.engine.tombstones import TOMBSTONES
from prlhf.errors import CheckpointError
from prlhf.evaluation.run_files import FIGURES
from prlhf.files import (
    MANIFEST,
    find_damage,
    fsync_path,
    link_or_copy,
    publish_directory,
    read_json,
    remove_directories,
    seal_directory,
    write_json_atomic,
    writing_tensors,
)
from prlhf.models.assemble import CONTEXTS, USER_IDS, USER_TEXTS, USERS
from prlhf.models.run_folder import STATE
from prlhf.models.tensor_files import read_tensors
from prlhf.models.user_rows import STORE, count_equal_rows, write_without
from prlhf.usermodel.store import UserStore

RECEIPT = "forgotten-{tag}.json"
PREFIX = ".forget-"
UNUSABLE = "delete the checkpoint, which cannot be used, and call prlhf forget again"
NEW, OLD = f"{PREFIX}new-", f"{PREFIX}old-"


def find_user(checkpoint: Path, user_id: str) -> list[str]:
    """The files of a checkpoint from which forgetting a user would take something.

    Raises: CheckpointError: the user is the only one of the model, or a damaged store.
    """
    users = read_json(checkpoint / USER_IDS)["user_ids"]
    without = _json_without(checkpoint, user_id)
    files = [name for name, value in without.items() if value != read_json(checkpoint / name)]
    if user_id in users:
        files += [name for name, tables in _tables(checkpoint, len(users)).items() if tables]
    if (checkpoint / STORE).is_dir():
        files += [f"{STORE}/"] * _has_row(checkpoint / STORE, user_id)
    if users == [user_id]:
        raise CheckpointError(f"{checkpoint}: the user is the only one of this model; delete it with all it holds")
    return files


def count_twins(checkpoint: Path, user_id: str) -> int:
    """Other users whose row is the user's very row, as of one whom `prlhf adapt` found to be like the user.

    Rows that say nothing of anybody, the generic user's, count as nobody's.

    Raises: CheckpointError: a damaged store.
    """
    users = read_json(checkpoint / USER_IDS)["user_ids"]
    if (checkpoint / STORE).is_dir():
        return count_equal_rows(checkpoint / STORE, user_id)
    if user_id not in users:
        return 0
    tensors = read_tensors(checkpoint / USERS)
    tables = [tensors[key] for key in _tables(checkpoint, len(users)).get(USERS, [])]
    counts = [0]
    for table in tables:
        first = len(table) - len(users)  # 1 where the generic user has a row
        generic = table[0] if first else torch.zeros_like(table[0])
        row = table[first + users.index(user_id)]
        if not torch.equal(row, generic):
            counts.append(int((table[first:] == row).flatten(1).all(dim=1).sum()) - 1)
    return max(counts)


def check_cleanable(checkpoint: Path) -> None:
    """Refuse to seal anew what is damaged, or what `remove_user` does not know.

    Raises: CheckpointError: a damaged file, or a folder inside that is no user store.
    """
    # A tombstone may be newer than the manifest, where a copy of an earlier one was sealed.
    damage = [line for line in find_damage(checkpoint) if not line.startswith(f"{checkpoint / TOMBSTONES}:")]
    wrong = [f"{line}; {UNUSABLE}" for line in damage]
    wrong += [f"{path}: a folder inside a checkpoint, which prlhf forget cannot clean; nothing was changed"
              for path in checkpoint.iterdir() if path.is_dir() and path.name != STORE]
    if wrong:
        raise CheckpointError(*wrong)


def remove_user(checkpoint: Path, user_id: str) -> None:
    """Replace a checkpoint by one without the user, sealed anew; files that stay as they are become links.

    Training data is no longer compared on resume, as it must change, too.
    """
    users = read_json(checkpoint / USER_IDS)["user_ids"]
    new = checkpoint.with_name(f"{NEW}{checkpoint.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    values = _json_without(checkpoint, user_id)
    values[STATE] = {**read_json(checkpoint / STATE), "data_sha256": None}
    tensors = {}
    if user_id in users:
        tensors = {
            name: _without_row(read_tensors(checkpoint / name), tables, users.index(user_id), len(users))
            for name, tables in _tables(checkpoint, len(users)).items()
            if tables
        }
    unsealed = []
    shards: dict[str, tuple[int, str]] = {}
    for path in sorted(checkpoint.iterdir()):
        if path.name in values:
            write_json_atomic(new / path.name, values[path.name])
        elif path.name in tensors:
            with writing_tensors(new / path.name):
                save_file(tensors[path.name], new / path.name)
        elif path.name == TOMBSTONES or path.match(RECEIPT.format(tag="*")):
            unsealed.append(path)
        elif path.name == STORE:
            shards = write_without(new / STORE, path, user_id)
            changed = [name for name in shards if not (path / name).is_file()]
            _share(new / STORE, changed, checkpoint.parent.glob(f"step-*/{STORE}"))
        elif path.name != MANIFEST and not path.name.startswith("."):
            link_or_copy(path, new / path.name)
    seal_directory(new, {f"{STORE}/{name}": entry for name, entry in shards.items()})
    for path in unsealed:  # they change while the rest does not
        shutil.copyfile(path, new / path.name)
        fsync_path(new / path.name)
    old = checkpoint.with_name(f"{OLD}{checkpoint.name}")
    checkpoint.rename(old)
    publish_directory(new, checkpoint)
    remove_directories([old])


def compares_data(checkpoint: Path) -> bool:
    """Whether a resume would ask for the very data that the checkpoint was trained on."""
    return read_json(checkpoint / STATE).get("data_sha256") is not None


def has_begun_rename(checkpoint: Path) -> bool:
    """Whether a call of `remove_user` was cut short between the renames of a checkpoint."""
    return not checkpoint.exists() and checkpoint.with_name(f"{OLD}{checkpoint.name}").is_dir()


def finish_rename(checkpoint: Path) -> None:
    """Bring to its end what `remove_user` had begun when it was killed; the checkpoint is the old one or the new."""
    new, old = checkpoint.with_name(f"{NEW}{checkpoint.name}"), checkpoint.with_name(f"{OLD}{checkpoint.name}")
    if old.is_dir() and not checkpoint.exists():
        publish_directory(new, checkpoint)
    remove_directories([old, new])


def finish_renames(parent: Path) -> None:
    """`finish_rename` of every checkpoint of a folder."""
    for path in parent.glob(f"{PREFIX}*"):
        finish_rename(parent / path.name.removeprefix(NEW).removeprefix(OLD))


def _json_without(checkpoint: Path, user_id: str) -> dict[str, Any]:
    """What the files with ids hold without the user, by name."""
    values: dict[str, Any] = {
        USER_IDS: {"user_ids": [user for user in read_json(checkpoint / USER_IDS)["user_ids"] if user != user_id]}
    }
    for name in (CONTEXTS, USER_TEXTS):
        if (checkpoint / name).is_file():
            values[name] = {user: own for user, own in read_json(checkpoint / name).items() if user != user_id}
    if (checkpoint / FIGURES).is_file():
        values[FIGURES] = scrub(read_json(checkpoint / FIGURES), user_id)[0]
    return values


def _has_row(store: Path, user_id: str) -> bool:
    try:
        with UserStore.open(store) as opened:
            return user_id in opened
    except CheckpointError as error:
        raise CheckpointError(*(f"{line.rpartition('; ')[0]}; {UNUSABLE}" for line in error.messages)) from None


def _tables(checkpoint: Path, num_users: int) -> dict[str, list[str]]:
    """File -> its tensors with a row a user: the users' own, and their moments and step counts."""
    tables = {}
    for name, prefix in ((USERS, "user_encoder."), (OPTIMIZER, "")):
        if (checkpoint / name).is_file():
            tables[name] = [
                key
                for key, tensor in read_tensors(checkpoint / name).items()
                if any(f"{prefix}{key}.".startswith(f"{table}.") for table in ROW_TABLES)
                and tensor.dim() > 0
                and len(tensor) >= num_users
            ]
    return tables


def _without_row(tensors: dict[str, Tensor], tables: list[str], place: int, num_users: int) -> dict[str, Tensor]:
    """The tensors without the user's row; a table with a row more than there are users starts with the generic one.

    Args:
        place: of the user in the list of users, from 0.
    """
    kept = dict(tensors)
    for key in tables:
        table = tensors[key]
        row = place + len(table) - num_users
        kept[key] = table.new_empty((len(table) - 1, *table.shape[1:]))
        kept[key][:row], kept[key][row:] = table[:row], table[row + 1 :]
    return kept


def _share(folder: Path, names: Iterable[str], others: Iterable[Path]) -> None:
    """Make files links to those of the same name and content in other folders, as they were before they changed."""
    others = list(others)
    for name in names:
        for twin in (other / name for other in others):
            if twin.is_file() and not twin.is_symlink() and filecmp.cmp(twin, folder / name, shallow=False):
                (folder / name).unlink()
                link_or_copy(twin, folder / name)
                break
