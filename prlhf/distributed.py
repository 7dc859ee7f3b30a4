"""Ranks and collectives; without torchrun there is one rank and every collective gives back its input."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from prlhf.errors import ConfigError

DEFAULT_TIMEOUT_S = 600.0
_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init_process_group(device_type: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Join the process group that torchrun described in the environment; alone, do nothing.

    On CUDA the rank's own device becomes the current one.

    Args:
        device_type: "cuda" communicates by NCCL, anything else by gloo.
        timeout_s: a collective that waits longer for another rank raises RuntimeError.
    Raises: ConfigError: the environment describes a rank only in part.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    missing = [name for name in _TORCHRUN_VARIABLES if name not in os.environ]
    if missing:
        size = os.environ["WORLD_SIZE"]
        raise ConfigError(f"environment: WORLD_SIZE is {size} but {', '.join(missing)} is not set; start with torchrun")
    timeout = timedelta(seconds=timeout_s)
    store, rank_, world_size_ = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps one store over restarts: without a prefix a restarted rank reads the addresses of the dead ones.
    store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    device = None
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank_, world_size=world_size_, timeout=timeout, device_id=device
    )


def teardown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes take part, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank is the one that logs and writes."""
    return rank() == 0


def barrier(*, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Wait for every rank; on gloo the RuntimeError after `timeout_s` names the ranks that did not come."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":
        dist.monitored_barrier(timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
    else:
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; the same tensor is returned, on whatever device it is."""
    if dist.is_initialized():
        moved = tensor.to(_communication_device())
        dist.all_reduce(moved)
        tensor.copy_(moved)
    return tensor


def all_reduce_any(flag: bool) -> bool:
    """Whether the flag is set on any rank, the same answer on all."""
    count = torch.tensor(int(flag), device=_communication_device())
    return bool(all_reduce_sum(count).item() > 0)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank, as it comes back from JSON: a tuple is a list, also when alone.

    Args:
        value: anything JSON can hold; read on rank 0 only.
    """
    payload = json.dumps(value).encode() if is_main() else b""
    if dist.is_initialized():
        payload = _broadcast_bytes(payload)
    return json.loads(payload)


def _broadcast_bytes(payload: bytes) -> bytes:
    device = _communication_device()
    length = torch.tensor(len(payload), device=device)
    dist.broadcast(length, src=0)
    buffer = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    if payload:
        buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(buffer, src=0)
    return bytes(buffer.tolist())


def _communication_device() -> torch.device:
    uses_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if uses_nccl else torch.device("cpu")
