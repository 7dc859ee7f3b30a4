"""A table with a row a user, of so many users that only rows that were used may take memory."""

from __future__ import annotations

import math
import mmap
import shutil
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prlhf.errors import RunDirError

LARGE_TABLE_BYTES = 4 * 2**20
_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # of all tensors of `lazy_zeros` that are left


class RowTable(nn.Parameter):
    """A large table, whose gradient is sparse: a step costs what its rows cost, whatever the number of users.

    Args:
        bring: fills rows (B,) int64 before they are gathered, where they are not all there; None: they are.
    """

    bring: Callable[[Tensor], None] | None = None


def make_table(*shape: int) -> nn.Parameter:
    """A table of zeros, float32: a `RowTable` if it is large."""
    if 4 * torch.Size(shape).numel() < LARGE_TABLE_BYTES:
        return nn.Parameter(torch.zeros(shape))
    return RowTable(lazy_zeros(*shape))


def lazy_zeros(*shape: int) -> Tensor:
    """Zeros, float32, on the CPU, of which only pages that were used exist.

    They are mapped from a file without a name in the folder for temporary files (TMPDIR), which takes disk where rows
    were written; so the system can put rows that are not in use there when memory is short. Writing where the disk has
    no room kills the process, so look before: `check_room`.
    """
    num_bytes = 4 * torch.Size(shape).numel()
    with tempfile.TemporaryFile() as file:
        file.truncate(num_bytes)
        pages = mmap.mmap(file.fileno(), num_bytes)
    pages.madvise(mmap.MADV_RANDOM)  # reading ahead would bring pages that nobody uses into being
    _mapped.add(pages)
    return torch.frombuffer(pages, dtype=torch.float32).view(shape)


def check_room(num_bytes: int) -> None:
    """Refuse to begin what would write more than the folder for temporary files has room for.

    Raises: RunDirError: it has less.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise RunDirError(
            f"{folder}: {free / 2**20:.0f} MiB free for temporary files, about {math.ceil(num_bytes / 2**20)} MiB "
            "needed; make room, or name another folder in TMPDIR"
        )


def let_go_pages() -> None:
    """Take the pages of all `lazy_zeros` out of this process's memory, where rows that were used once would stay.

    What is written stays with the system, which brings a page back when it is used again.
    """
    for pages in _mapped:
        pages.madvise(mmap.MADV_DONTNEED)  # of a shared mapping of a file, so nothing is lost


def is_mapped(table: Tensor) -> bool:
    """Whether a table, and what stands beside it, is `lazy_zeros`: a large one is where it is made, on the CPU."""
    return isinstance(table, RowTable) and table.device.type == "cpu"


@torch.no_grad()
def zero_(table: nn.Parameter) -> None:
    """Set a table to zero without touching the pages of a large one."""
    if is_mapped(table):
        table.data = lazy_zeros(*table.shape)
    else:
        table.zero_()


class GatherRows(torch.autograd.Function):
    """Rows (B, ...) of a table (N, ...) by (B,) int64; the table's gradient is sparse in its first dimension."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        """The rows."""
        ctx.rows, ctx.shape = rows, table.shape
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """One entry for each row that was asked for, repeated ones too; `coalesce` sums them in this order."""
        return torch.sparse_coo_tensor(ctx.rows[None], gradient, ctx.shape, check_invariants=False), None
