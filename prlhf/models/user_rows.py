"""A large table of users in a checkpoint: a user store in place of the table, so that only trained rows take space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from prlhf.data.user_index import UserIndex
from prlhf.errors import CheckpointError
from prlhf.usermodel import UserModel
from prlhf.usermodel.row_table import RowTable, lazy_zeros
from prlhf.usermodel.store import LOCK, RowField, UserStore

STORE = "users"
SHARDS = f"{STORE}/rows-*.bin"  # whose rows have checksums of their own
STORE_FROM_BYTES = 2**30 // 3  # of a table: with its two moments a GiB of each checkpoint
CHUNK = 1024
VERSIONS = 2  # rows in a run's store, older ones among them, for each of its users; beyond, it is made anew
T = TypeVar("T")


def stored_table(user_encoder: UserModel | None) -> tuple[str, RowTable] | None:
    """The parameter that a checkpoint keeps as a store, with its name: a large table whose row i - 1 is user i's."""
    found = _row_table(user_encoder)
    return found if found is not None and found[1].nbytes >= STORE_FROM_BYTES else None


def table_of_store(checkpoint: Path, user_encoder: UserModel | None) -> tuple[str, RowTable] | None:
    """The parameter whose rows are in a checkpoint's store, if it has one.

    Whatever its size: a table that lost a user may be a little smaller than those that get a store.
    """
    return _row_table(user_encoder) if (checkpoint / STORE).is_dir() else None


def _row_table(user_encoder: UserModel | None) -> tuple[str, RowTable] | None:
    if user_encoder is not None:
        for name, table in user_encoder.named_parameters():
            if isinstance(table, RowTable) and len(table) == user_encoder.num_users:
                return name, table
    return None


def write_table(
    directory: Path,
    previous: Path | None,
    table: Tensor,
    moments: Mapping[str, Tensor],
    users: UserIndex,
    moved: Sequence[int],
) -> dict[str, tuple[int, str]]:
    """Write a store of a whole table, of users with a row in the previous one and of those who moved since.

    As `write_rows` does; but where older versions of rows would be more than the users, all rows are written anew, and
    what the previous store forgot stays forgotten.
    """
    if previous is None:
        return write_rows(directory, None, table, moments, users, moved)
    with UserStore.open(previous) as store:
        num_new = sum(users.user_ids[row] not in store for row in moved)
        if store.num_slots + len(moved) <= VERSIONS * (len(store) + num_new):
            return write_rows(directory, previous, table, moments, users, moved)
        UserStore.create(directory, store.fields, forgotten=store).close()
        rows = sorted({*moved, *(users.index(user_id) - 1 for user_id in store)})
    return _put_rows(directory, table, moments, users, rows)


def write_rows(
    directory: Path,
    previous: Path | None,
    table: Tensor,
    moments: Mapping[str, Tensor],
    users: UserIndex,
    rows: Sequence[int],
) -> dict[str, tuple[int, str]]:
    """Write a store: what the previous one holds, and rows of the table with their moments over it.

    Args:
        directory: of the new store, empty.
        previous: a store to go on from; its full shards are hard-linked.
    Returns: size and sha256 of the full shards by name.
    """
    if previous is None:
        fields = {name: RowField(tuple(moment.shape[1:]), moment.dtype) for name, moment in moments.items()}
        UserStore.create(directory, {"row": RowField(tuple(table.shape[1:]), table.dtype), **fields}).close()
    else:
        with UserStore.open(previous) as store:
            store.link_into(directory)
    return _put_rows(directory, table, moments, users, rows)


@torch.no_grad()
def _put_rows(
    directory: Path, table: Tensor, moments: Mapping[str, Tensor], users: UserIndex, rows: Sequence[int]
) -> dict[str, tuple[int, str]]:
    with UserStore.open(directory, write=True) as store:
        for chunk in _chunks(rows):
            values = {name: moment[chunk] for name, moment in moments.items()}
            store.put([users.user_ids[row] for row in chunk], table[chunk], **values)
        full = store.full_shards()
    (directory / LOCK).unlink()
    return full


def write_without(directory: Path, previous: Path, user_id: str) -> dict[str, tuple[int, str]]:
    """Write a store that holds what the previous one does, but nothing of a user; the previous one stays as it is.

    Shards without a row of the user's are hard-linked, others copied with zeros in its place.

    Args:
        directory: of the new store, empty.
    Returns: size and sha256 of the full shards by name.
    """
    with UserStore.open(previous) as store:
        store.link_into(directory, apart=user_id)
    with UserStore.open(directory, write=True) as store:
        store.forget(user_id)
        full = store.full_shards()
    (directory / LOCK).unlink()
    return full


def count_equal_rows(directory: Path, user_id: str) -> int:
    """Users of a store, but the user, whose row equals the user's bit for bit; 0 where that is zero or there is none.

    Raises: CheckpointError: a damaged row.
    """
    with UserStore.open(directory) as store:
        if user_id not in store:
            return 0
        row = store.read([user_id])[0]
        if not row.any():
            return 0
        same = ((store.read(users) == row).flatten(1).all(dim=1) for users in _chunks(list(store)))
        return sum(int(found.sum()) for found in same) - 1


@torch.no_grad()
def read_rows_(directory: Path, table: Tensor, users: UserIndex, field: str = "row") -> None:
    """Fill a table of zeros with what a store holds.

    Raises: CheckpointError: damage, rows of another shape or not finite, or a user whom the checkpoint does not know.
    """
    with UserStore.open(directory) as store:
        _check_field(store, table, field)
        for user_ids in _chunks(list(store)):
            if unknown := [user_id for user_id in user_ids if user_id not in users]:
                raise CheckpointError(f"{directory}: user {unknown[0]!r} is not in users.json; use another checkpoint")
            _copy_rows_(store, table, [users.index(user_id) - 1 for user_id in user_ids], user_ids, field)


def read_on_demand_(directory: Path, table: RowTable, users: UserIndex) -> None:
    """Leave the rows of a store there; each is read, and checked, when it is first gathered.

    The table itself holds zeros for users nobody gathered, so it is to be read by `gather_rows` alone.

    Raises: CheckpointError: rows of another shape; later, damage, or a store that is there no more.
    """
    with UserStore.open(directory) as store:
        _check_field(store, table, "row")
    there: set[int] = set()

    def bring(rows: Tensor) -> None:
        """Copy those of the rows that are not there yet into the table."""
        missing = [row for row in dict.fromkeys(rows.tolist()) if row not in there]
        if missing:
            with UserStore.open(directory) as store:
                for chunk in _chunks(missing):
                    stored = [row for row in chunk if users.user_ids[row] in store]
                    _copy_rows_(store, table.data, stored, [users.user_ids[row] for row in stored], "row")
                    there.update(chunk)

    table.bring = bring


def _check_field(store: UserStore, table: Tensor, field: str) -> None:
    expected = RowField(tuple(table.shape[1:]), table.dtype)
    if store.fields.get(field) != expected:
        got = store.fields.get(field)
        raise CheckpointError(f"{store.directory}: {field}: got {got}, expected {expected}; use another checkpoint")


def _copy_rows_(store: UserStore, table: Tensor, rows: Sequence[int], user_ids: Sequence[str], field: str) -> None:
    """Fill rows of a table with what a store holds of these users, in the same order."""
    if not rows:
        return
    values = store.read(user_ids, field)
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{store.directory}: {field}: not finite; use another checkpoint")
    table[list(rows)] = values.to(table.device)


def empty_moments(table: Tensor) -> dict[str, Tensor]:
    """AdamW's moments of no row at all: what stands beside rows, with its shapes."""
    return {"step": table.new_zeros(0), "exp_avg": table.detach()[:0], "exp_avg_sq": table.detach()[:0]}


def read_moments(directory: Path, table: Tensor, users: UserIndex) -> dict[str, Tensor]:
    """Moments of a table's rows, zero where the store has none."""
    moments = {}
    for name, rows in empty_moments(table).items():
        moments[name] = lazy_zeros(len(table), *rows.shape[1:]).to(table.device)
        read_rows_(directory, moments[name], users, name)
    return moments


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]
