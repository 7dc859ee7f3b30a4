"""The ids of a model's users, of which there may be millions."""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from prlhf.data.quoting import did_you_mean, quote
from prlhf.errors import DataError

GENERIC_USER_ID = 0
GENERIC, ALL = "generic", "all"  # what commands take beside ids
RESERVED_IDS = {
    GENERIC: "names the generic user in every command",
    ALL: "names all users where --users asks for some",
}
LARGE_BYTES = 4 * 2**20  # of ids and their index, from which on they stand in a file
_TEXT = {"encoding": "utf-8", "errors": "surrogatepass"}


class UserIds(Sequence[str]):
    """Ids in one line of bytes, each made a str when it is asked for: 20 bytes and its text, where a str in a dict has
    some 200. Those of many users are mapped from a file without a name in the folder for temporary files (TMPDIR), so
    they take memory where they are used.

    Equal to any tuple or list of the same ids.
    """

    def __init__(self, user_ids: Iterable[str]) -> None:
        text, ends, hashes = bytearray(), array("q", [0]), array("q")
        for user_id in user_ids:
            text += user_id.encode(**_TEXT)
            ends.append(len(text))
            hashes.append(hash(user_id))
        unordered = np.array(hashes, dtype=np.int64)
        order = unordered.argsort(kind="stable")
        arrays: list[NDArray[Any]] = [
            np.frombuffer(ends, dtype=np.int64),
            unordered[order],
            order.astype(np.int32 if len(order) < 2**31 else np.int64),
            np.frombuffer(text, dtype=np.uint8),
        ]
        num_bytes = sum(each.nbytes for each in arrays)
        self._pages = _map_(arrays) if num_bytes >= LARGE_BYTES else None
        self._ends, self._hashes, self._order, self._text = arrays

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            return tuple(self[i] for i in range(*place.indices(len(self))))
        own = range(len(self))[place]
        return self._text[self._ends[own] : self._ends[own + 1]].tobytes().decode(**_TEXT)

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(len(self)))

    def __contains__(self, user_id: object) -> bool:
        return isinstance(user_id, str) and self.find(user_id) is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (UserIds, tuple, list)):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[UserIds], tuple[list[str]]]:
        return UserIds, (list(self),)  # hashes are of this process alone

    def __repr__(self) -> str:
        return f"UserIds({list(self[:4])}{', ...' if len(self) > 4 else ''})"

    def find(self, user_id: str) -> int | None:
        """First place of an id; None: it is none of these."""
        own = hash(user_id)
        for near in range(int(self._hashes.searchsorted(own)), len(self)):
            if self._hashes[near] != own:
                break
            place = int(self._order[near])
            if self[place] == user_id:
                return place
        return None

    def find_twice(self) -> str | None:
        """An id that stands in more than one place."""
        again = (self._hashes[1:] == self._hashes[:-1]).nonzero()[0] + 1
        places = sorted(self._order[again].tolist())
        return next((self[place] for place in places if self.find(self[place]) != place), None)

    def let_go_pages(self) -> None:
        """Take what was read of a mapped file out of this process's memory; it is read again when it is asked for."""
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)


def _map_(arrays: list[NDArray[Any]]) -> mmap.mmap | None:
    """Replace arrays by ones that are mapped from a file without a name; None: no room, they stay as they are."""
    try:
        with tempfile.TemporaryFile() as file:
            for each in arrays:
                file.write(each.data)
            file.flush()
            pages = mmap.mmap(file.fileno(), 0)
    except OSError:
        return None
    start = 0
    for place, each in enumerate(arrays):
        arrays[place] = np.frombuffer(pages, dtype=each.dtype, count=len(each), offset=start)
        start += each.nbytes
    return pages


def check_user_id(user_id: str, where: str) -> None:
    """Refuse an id that commands would take for something else.

    Args:
        where: file and line, for the message.
    Raises: DataError: it is a reserved one.
    """
    if user_id in RESERVED_IDS:
        raise DataError(f"{where}: user {quote(user_id)}: {RESERVED_IDS[user_id]}; give the user another id")


class UserIndex:
    """String ids of users <-> 1..U.

    Raises: DataError: the same id twice.
    """

    def __init__(self, user_ids: Iterable[str]) -> None:
        self.user_ids = UserIds(user_ids)
        twice = self.user_ids.find_twice()
        if twice is not None:
            raise DataError(f"user id {quote(twice)} is listed twice; name every user once")
        self.user_ids.let_go_pages()

    def __len__(self) -> int:
        return len(self.user_ids)

    def __contains__(self, user_id: str) -> bool:
        return user_id in self.user_ids

    def index(self, user_id: str) -> int:
        """1..U of a known user.

        Raises: DataError: an unknown user.
        """
        place = self.user_ids.find(user_id)
        if place is None:
            hint = did_you_mean(user_id, self.user_ids)
            raise DataError(f"user {quote(user_id)} is not one of the {len(self)} known users{hint}")
        return place + 1

    def user_id(self, index: int) -> str:
        """String id of index 1..U; the generic user has none.

        Raises: DataError: an index outside 1..U.
        """
        if not 1 <= index <= len(self):
            raise DataError(f"user {index}: expected 1..{len(self)} ({GENERIC_USER_ID}, the generic user, has no id)")
        return self.user_ids[index - 1]
