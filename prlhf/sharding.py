"""Tensors of which each rank holds a part (torch's DTensor, as fully_shard makes them); others are left alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory; a whole tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(values: Tensor, tensor: Tensor) -> Tensor:
    """Whole values, the same on every rank, cut and placed as another tensor is."""
    values = values.to(tensor.device)
    if not isinstance(tensor, DTensor) or values.dim() == 0:
        return values
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)


def place_like(values: Tensor, tensor: Tensor) -> Tensor:
    """What this rank is to hold (`own_rows`, or all of a tensor that is whole), placed as another tensor is."""
    values = values.to(tensor.device)
    if not isinstance(tensor, DTensor) or values.dim() == 0:
        return values
    return DTensor.from_local(
        values, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def own_rows(tensor: Tensor) -> tuple[int, int] | None:
    """Of a sharded tensor's rows the first that this rank holds, and the one after its last; None where it is whole."""
    if not is_sharded(tensor) or tensor.dim() == 0:
        return None
    rows = local_part(shard_like(torch.arange(len(tensor)), tensor)).tolist()
    return (rows[0], rows[-1] + 1) if rows else (0, 0)
