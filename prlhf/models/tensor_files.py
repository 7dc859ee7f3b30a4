"""Tensors of a checkpoint in safetensors files: whole in one, or cut into rows, a part in a file of each rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from prlhf.distributed import all_reduce_any, all_reduce_sum, rank, world_size
from prlhf.errors import CheckpointError
from prlhf.files import read_json
from prlhf.sharding import own_rows

LAYOUT = ".parts.json"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file, finite.

    Raises: CheckpointError: unreadable, or holding NaN or infinity.
    """
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    _refuse_broken(path, _broken(state.items()))
    return state


def part_path(path: Path, number: int, num_parts: int) -> Path:
    """The file with one rank's rows of the tensors that `path` does not hold whole."""
    return path.with_name(f"{path.stem}.rank{number:05d}-of-{num_parts:05d}{path.suffix}")


def layout_path(path: Path) -> Path:
    """The file that says which rows are in which part."""
    return path.with_suffix(LAYOUT)


def row_bounds(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Of each sharded tensor where every rank's rows begin, and where the last one's end.

    Every rank calls this with the same names in the same order.
    """
    own = {name: rows for name, tensor in tensors.items() if (rows := own_rows(tensor)) is not None}
    if not own:
        return {}
    counts = torch.zeros(world_size(), len(own), dtype=torch.int64)
    counts[rank()] = torch.tensor([stop - start for start, stop in own.values()])
    ends = all_reduce_sum(counts).cumsum(dim=0).T.tolist()
    return {name: [0, *bounds] for name, bounds in zip(own, ends, strict=True)}


def make_layout(row_bounds: Mapping[str, list[int]], num_parts: int) -> dict[str, Any]:
    """The content of `layout_path`.

    Args:
        row_bounds: of each tensor cut along its first dimension num_parts + 1 numbers; part i holds the rows from the
            i-th up to the next one.
    """
    return {"num_parts": num_parts, "row_bounds": dict(row_bounds)}


class StoredTensors:
    """The tensors of `X.safetensors` and, where `X.parts.json` lies beside it, of its parts; read when asked for.

    Args:
        path: of X.safetensors.
    Attributes: kinds: name -> a meta tensor of that shape and type.
    Raises: CheckpointError: a file is unreadable, or does not hold the rows that the layout says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = _open(path)
        self._parts: list[Any] = []
        self._row_bounds: dict[str, list[int]] = {}
        self.kinds = {name: _kind(self._whole, name) for name in self._whole.keys()}  # noqa: SIM118 - no mapping
        if layout_path(path).exists():
            self._read_layout()

    def _read_layout(self) -> None:
        layout = read_json(layout_path(self.path))
        try:
            num_parts, self._row_bounds = int(layout["num_parts"]), dict(layout["row_bounds"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{layout_path(self.path)}: not a layout of parts; use another checkpoint") from None
        paths = [part_path(self.path, number, num_parts) for number in range(num_parts)]
        self._parts = [_open(path) for path in paths]
        held = [{name: _kind(part, name) for name in part.keys()} for part in self._parts]  # noqa: SIM118
        for name, bounds in self._row_bounds.items():
            if not _is_cut(bounds, num_parts) or name in self.kinds:
                raise CheckpointError(f"{layout_path(self.path)}: {name}: got {bounds}; use another checkpoint")
            known: Tensor | None = None
            for path, kinds, (start, stop) in zip(paths, held, pairwise(bounds), strict=True):
                part = kinds.get(name)
                fits = part is None if start == stop else part is not None and _continues(part, known, stop - start)
                if not fits:
                    raise CheckpointError(f"{path}: {name}: not rows {start} to {stop}; use another checkpoint")
                known = part if part is not None else known
            assert known is not None
            self.kinds[name] = known.new_empty((bounds[-1], *known.shape[1:]))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or of its rows those from the first number up to the second."""
        bounds = self._row_bounds.get(name)
        if bounds is None:
            return self._whole.get_tensor(name) if rows is None else self._whole.get_slice(name)[slice(*rows)]
        first, last = rows or (0, bounds[-1])
        kind = self.kinds[name]
        found = torch.empty((last - first, *kind.shape[1:]), dtype=kind.dtype)
        for part, (start, stop) in zip(self._parts, pairwise(bounds), strict=True):
            low, high = max(first, start), min(last, stop)
            if low < high:
                found[low - first : high - first] = part.get_slice(name)[low - start : high - start]
        return found

    def check_finite(self, rows: Mapping[str, tuple[int, int] | None]) -> None:
        """Refuse NaN and infinity.

        Args:
            rows: what this rank is going to `read`, by name. Where there are rows, ranks read different ones: then all
                of them call this, and refuse together.
        Raises: CheckpointError: which tensors.
        """
        broken = _broken((name, self.read(name, part)) for name, part in rows.items())
        if any(part is not None for part in rows.values()) and all_reduce_any(bool(broken)):
            broken = broken or ["what another rank reads"]
        _refuse_broken(self.path, broken)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def _kind(file: Any, name: str) -> Tensor:
    return file.get_tensor(name).to("meta")  # a view of the mapped file: nothing is read


def _is_cut(bounds: Any, num_parts: int) -> bool:
    """Whether these are bounds of rows, of at least one row."""
    if not (isinstance(bounds, list) and all(type(bound) is int for bound in bounds)):
        return False
    return len(bounds) == num_parts + 1 and bounds[0] == 0 < bounds[-1] and bounds == sorted(bounds)


def _continues(part: Tensor, known: Tensor | None, num_rows: int) -> bool:
    """Whether a part has as many rows, and rows like those of the part before."""
    if part.dim() == 0 or len(part) != num_rows:
        return False
    return known is None or (part.shape[1:], part.dtype) == (known.shape[1:], known.dtype)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint")


def _broken(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [name for name, tensor in tensors if tensor.is_floating_point() and not torch.isfinite(tensor).all()]


def _refuse_broken(path: Path, names: list[str]) -> None:
    if names:
        raise CheckpointError(f"{path}: not finite: {', '.join(sorted(names)[:5])}; use another checkpoint")
