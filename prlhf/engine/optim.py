"""Optimizer, schedule, and what happens to gradients between backward and the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prlhf.distributed import all_gather_rows, all_reduce_sum, world_size
from prlhf.sharding import is_sharded, local_part
from prlhf.usermodel.row_table import RowTable, check_room, is_mapped, lazy_zeros, let_go_pages

BUCKET_ELEMENTS = 16 * 2**20
RESIDENT_BYTES = 32 * 2**20  # of large tables' pages that steps touch before they are let go
CHECKED_ROWS = 1024  # of a large table, copied at a time
ROW_TABLES = ("user_encoder.offsets", "user_encoder.weights")  # a row a user


class RowLazyAdamW(torch.optim.AdamW):
    """AdamW, whose groups marked `by_row` hold tables of which a step moves only the rows that have a gradient.

    Under plain AdamW the momentum of a user's last row would go on moving that user in later steps. Each row counts
    its own steps for the bias correction, so a user's first step is a first step whenever it comes.
    """

    def __init__(self, groups: list[dict[str, Any]], *, fused: bool) -> None:
        super().__init__(groups, fused=fused)
        self.unsaved_rows: set[int] = set()  # of a large table, moved since a checkpoint was written or read
        self.saved_in: Path | None = None
        self._touched_bytes = 0

    @torch.no_grad()
    def is_finite(self, parameter: Tensor) -> bool:
        """Whether what this rank holds of a parameter is; of a large table only the rows in `unsaved_rows` are read."""
        if not isinstance(parameter, RowTable):
            return bool(torch.isfinite(local_part(parameter)).all())
        rows = torch.tensor(sorted(self.unsaved_rows), dtype=torch.int64, device=parameter.device)
        return all(bool(torch.isfinite(parameter[some]).all()) for some in rows.split(CHECKED_ROWS))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; no closure."""
        tables = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            if group["by_row"]
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for table, _, _ in tables:
            table.grad = None
        super().step()
        for table, grad, group in tables:
            table.grad = grad
            self._step_rows_(table, grad, group)
        if self._touched_bytes > RESIDENT_BYTES:
            let_go_pages()
            self._touched_bytes = 0

    def _step_rows_(self, table: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state["step"] = _zeros_beside(table, len(table))
            state["exp_avg"], state["exp_avg_sq"] = (_zeros_beside(table, *table.shape) for _ in range(2))
        if grad.is_sparse:
            rows, grad = grad.indices()[0], grad.values()
        else:
            rows = torch.arange(len(grad), device=grad.device)
        moved = grad.flatten(1).ne(0).any(dim=1)
        rows, grad = rows[moved], grad[moved]
        if isinstance(table, RowTable):
            self.unsaved_rows.update(rows.tolist())
        if is_mapped(table):
            self._touched_bytes += len(rows) * _bytes_of_pages(table)
        beta1, beta2 = group["betas"]
        state["step"][rows] += 1
        mean = state["exp_avg"][rows].lerp(grad, 1 - beta1)
        square = state["exp_avg_sq"][rows].lerp(grad.square(), 1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        steps = state["step"][rows].view(-1, *[1] * (grad.dim() - 1))
        mean, square = mean / (1 - beta1**steps), square / (1 - beta2**steps)
        table.index_add_(0, rows, -group["lr"] * mean / (square.sqrt() + group["eps"]))


def _bytes_of_pages(table: Tensor) -> int:
    """That a step of one row brings into memory: of the table, its two moments and its count of steps."""
    return 3 * max(table[:1].numel() * table.element_size(), PAGESIZE) + PAGESIZE


def check_room_of_rows(parameters: Iterable[nn.Parameter], num_rows: int) -> None:
    """Refuse to train so many rows of large tables where the folder for temporary files has no room for them.

    Raises: RunDirError: it has too little.
    """
    for table in filter(is_mapped, parameters):
        check_room(min(num_rows * _bytes_of_pages(table), 3 * table.nbytes + 4 * len(table)))


def _zeros_beside(table: Tensor, *shape: int) -> Tensor:
    if is_mapped(table):
        return lazy_zeros(*shape)
    return torch.zeros(shape, device=table.device)


def make_optimizer(
    parameters: dict[str, nn.Parameter],
    *,
    lr: float,
    user_lr: float,
    cluster_lr: float,
    encoder_lr: float,
    weight_decay: float,
) -> RowLazyAdamW:
    """Fused AdamW in groups: the backbone, a reward model's head (a fused step takes no sharded tensors and whole ones
    together), what users share, their own soft prompts, their weights of shared ones, an encoder.

    Weight decay applies to model, head and encoder; it would pull soft prompts towards zero, which is not the generic
    user.
    """
    rates = {
        "model": lr,
        "head": lr,
        "users": user_lr,
        "user_rows": user_lr,
        "cluster_weights": cluster_lr,
        "encoder": encoder_lr,
    }
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in parameters.items():
        groups[_group_of(name)].append(parameter)
    return RowLazyAdamW(
        [
            {
                "params": members,
                "name": name,
                "lr": rates[name],
                "base_lr": rates[name],
                "weight_decay": weight_decay if name in ("model", "head", "encoder") else 0.0,
                "by_row": name in ("user_rows", "cluster_weights"),
            }
            for name, members in groups.items()
            if members
        ],
        fused=True,
    )


def _group_of(name: str) -> str:
    if name == "score.weight":
        return "head"
    if name == "user_encoder.weights":
        return "cluster_weights"
    if name in ROW_TABLES:
        return "user_rows"
    if name.startswith("user_encoder.encoder."):
        return "encoder"
    return "users" if name.startswith("user_encoder.") else "model"


def warmup_cosine(step: int, *, warmup_steps: int, max_steps: int) -> float:
    """Factor on the learning rate at 0-based `step`: linear from 1/warmup to 1, then a half cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate_(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def all_reduce_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over ranks, in buckets; a parameter unused on this rank counts as zero.

    The loss is already divided by the rows of the global step, so the sum is the global gradient. Of large tables of
    users only rows travel, and the sum is coalesced.
    """
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if isinstance(parameter, RowTable):
            _all_reduce_rows_(parameter)
            continue
        if world_size() == 1 or is_sharded(parameter):  # backward has summed what is sharded
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (size + parameter.grad.numel() > BUCKET_ELEMENTS or parameter.grad.dtype != bucket[0].dtype):
            _all_reduce_bucket_(bucket)
            bucket, size = [], 0
        bucket.append(parameter.grad)
        size += parameter.grad.numel()
    if bucket:
        _all_reduce_bucket_(bucket)


def _all_reduce_rows_(table: RowTable) -> None:
    if world_size() == 1:
        table.grad = None if table.grad is None else table.grad.coalesce()
        return
    rows = torch.empty(0, dtype=torch.int64, device=table.device)
    values = table.detach()[:0]
    if table.grad is not None:
        grad = table.grad.coalesce()
        rows, values = grad.indices()[0], grad.values()
    gathered = torch.sparse_coo_tensor(all_gather_rows(rows)[None], all_gather_rows(values), table.shape)
    table.grad = gathered.coalesce()


def _all_reduce_bucket_(gradients: list[Tensor]) -> None:
    flat = all_reduce_sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for gradient, reduced in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(reduced.view_as(gradient))


def clip_gradients_(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a global L2 norm of at most `max_norm`; returns the norm before, a scalar tensor."""
    dense = [_dense(parameter) for parameter in parameters]
    if not any(map(is_sharded, parameters)):
        return nn.utils.clip_grad_norm_(dense, max_norm, error_if_nonfinite=False)
    gradients: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter, part in zip(parameters, dense, strict=True):
        if part.grad is not None:
            gradients[is_sharded(parameter)].append(part.grad)
    ours, everybodys = (nn.utils.get_total_norm(gradients[sharded]).float().square() for sharded in (True, False))
    norm = (all_reduce_sum(ours) + everybodys.to(ours.device)).sqrt()
    nn.utils.clip_grads_with_norm_(dense, max_norm, norm)
    return norm


def _dense(parameter: nn.Parameter) -> Tensor:
    """The parameter, or in place of a large table or a sharded one a tensor whose gradient is what this rank holds."""
    if parameter.grad is None or not (parameter.grad.is_sparse or is_sharded(parameter)):
        return parameter
    own = parameter.grad.values() if parameter.grad.is_sparse else local_part(parameter.grad)
    part = torch.empty_like(own)
    part.grad = own
    return part
