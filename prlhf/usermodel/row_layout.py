"""How a user's row lies in a file: arrays of fixed shapes one after the other, each with a checksum."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf.errors import DataError

CHECK_BYTES = 4  # crc32, little-endian


@dataclass(frozen=True)
class RowField:
    """One array that every user has: its shape, () for a number, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of one user's array."""
        return math.prod(self.shape) * self.dtype.itemsize


class RowLayout:
    """The fields of a record: "row", and any others beside it.

    A checksum starts from the user's id, so that another user's array does not pass for this one's.

    Raises: ValueError: no "row", an empty array, or a type that torch does not have.
    """

    def __init__(self, fields: Mapping[str, RowField]) -> None:
        if "row" not in fields or not all(field.num_bytes > 0 for field in fields.values()):
            raise ValueError(f"fields: got {dict(fields)}, expected 'row' and arrays of at least one number")
        self.fields = dict(fields)
        self.offsets, self.record_bytes = {}, 0
        for name, field in self.fields.items():
            self.offsets[name] = self.record_bytes
            self.record_bytes += field.num_bytes + CHECK_BYTES

    def to_json(self) -> str:
        """The fields as text."""
        return json.dumps(
            {name: [field.shape, str(field.dtype).removeprefix("torch.")] for name, field in self.fields.items()}
        )

    @classmethod
    def from_json(cls, text: str) -> RowLayout:
        """The layout of `to_json`."""
        fields = {}
        for name, (shape, dtype_name) in json.loads(text).items():
            dtype = getattr(torch, dtype_name, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name}: torch has no type {dtype_name!r}")
            fields[name] = RowField(tuple(map(int, shape)), dtype)
        return cls(fields)

    def pack(self, keys: Sequence[bytes], arrays: Mapping[str, Tensor]) -> bytes:
        """Records of users one after the other; a field without an array is zero.

        Args:
            keys: the users' ids.
            arrays: (N, ...) by field.
        Raises: ValueError: an unknown field, or another shape or type.
        """
        if unknown := sorted(arrays.keys() - self.fields.keys()):
            raise ValueError(f"{unknown[0]}: no field of this store, which has {', '.join(self.fields)}")
        columns = []
        for name, field in self.fields.items():
            shape = (len(keys), *field.shape)
            array = arrays[name] if name in arrays else torch.zeros(shape, dtype=field.dtype)
            if tuple(array.shape) != shape or array.dtype != field.dtype:
                raise ValueError(f"{name}: got {tuple(array.shape)} {array.dtype}, expected {shape} {field.dtype}")
            flat = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            columns.append((flat.numpy().tobytes(), field.num_bytes))
        parts: list[bytes] = []
        for index, key in enumerate(keys):
            for data, size in columns:
                value = data[index * size : (index + 1) * size]
                parts += value, _checksum(key, value)
        return b"".join(parts)

    def unpack(self, field: str, keys: Sequence[bytes], parts: Sequence[bytes]) -> Tensor:
        """One field's arrays (N, ...) of users, from its bytes with their checksums, on the CPU.

        Raises: ValueError: holding the index of the first one whose checksum differs.
        """
        shape, dtype = self.fields[field].shape, self.fields[field].dtype
        values = []
        for index, (key, part) in enumerate(zip(keys, parts, strict=True)):
            value = part[:-CHECK_BYTES]
            if _checksum(key, value) != part[-CHECK_BYTES:]:
                raise ValueError(index)
            values.append(value)
        if not values:
            return torch.empty((0, *shape), dtype=dtype)
        return torch.frombuffer(bytearray(b"".join(values)), dtype=dtype).view(len(values), *shape)


def _checksum(key: bytes, value: bytes) -> bytes:
    return zlib.crc32(value, zlib.crc32(key)).to_bytes(CHECK_BYTES, "little")


def encode_id(user_id: str) -> bytes:
    """A user's key.

    Raises: DataError: text that UTF-8 cannot write.
    """
    try:
        return user_id.encode()
    except UnicodeEncodeError:
        raise DataError(f"user {user_id!r}: holds half a character (a lone surrogate); mend the id") from None


def show_id(user_id: str) -> str:
    """An id as messages show it, which may be long."""
    return repr(user_id if len(user_id) <= 40 else user_id[:40] + "...")
