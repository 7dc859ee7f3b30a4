"""Tensors of which each rank holds a part (torch's DTensor, as fully_shard makes them); others are left alone."""

from __future__ import annotations

from collections.abc import Mapping

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


@torch.no_grad()
def gather_on_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the main rank's CPU, gathered one after the other; sharded ones are left out on other ranks.

    Every rank calls this with the same names in the same order.
    """
    gathered = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            whole = tensor.full_tensor()
            if tensor.device_mesh.get_rank() != 0:
                continue
            tensor = whole.cpu()
        gathered[name] = tensor
    return gathered
