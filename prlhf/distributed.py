"""Ranks and collectives; without torchrun there is one rank and every collective gives back its input."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from prlhf.errors import ConfigError, Preempted, RankError

DEFAULT_TIMEOUT_S = 600.0
STORE_POLL_S = 1.0  # between looks at whether a rank said that it leaves
PULSE_VARIABLE = "PRLHF_PULSE"
PULSE = struct.Struct("<qd?")  # beats so far, silence beyond the usual that is no bad sign (s), waits for others
_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_STOPPING = "stopping"  # a key in the group's store: a rank that a signal stopped has left
_SAID = "said "  # before a line in the group's store: how many ranks came to say it
_group_store: dist.Store | None = None
_num_waits = 0  # at the store; the same on all ranks
_pulse_file: int | None = None
_num_beats = 0


def start_pulse() -> None:
    """From now on `beat` leaves signs of life in the file that whoever started this rank named in the environment."""
    global _pulse_file
    path = os.environ.get(PULSE_VARIABLE)
    _pulse_file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT)


def beat(*, patience_s: float = 0.0) -> None:
    """A sign of life, between steps and batches.

    Args:
        patience_s: how much longer than usual this rank may be silent now.
    """
    global _num_beats
    _num_beats += 1
    _write_pulse(patience_s, is_waiting=False)


def _write_pulse(patience_s: float, *, is_waiting: bool) -> None:
    if _pulse_file is not None:
        os.pwrite(_pulse_file, PULSE.pack(_num_beats, patience_s, is_waiting), 0)


def init_process_group(device_type: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Join the process group that torchrun described in the environment; alone, do nothing.

    On CUDA the rank's own device becomes the current one.

    Args:
        device_type: "cuda" communicates by NCCL, anything else by gloo.
        timeout_s: a collective that waits longer for another rank raises RankError.
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
        number, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= available:
            raise ConfigError(f"rank {number} of this machine has no GPU, of which there are {available}; start "
                              f"{available} ranks, or set train.device=cpu")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank_, world_size=world_size_, timeout=timeout, device_id=device
    )
    global _group_store
    _group_store = store


def teardown() -> None:
    """Leave the process group; `first_to_say` goes on to work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def host_store() -> dist.TCPStore:
    """A store on a free port of this machine, for ranks that find its `port` in their environment; it outlives them."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def first_to_say(line: str) -> bool:
    """Whether no rank of the group has asked this of the line before: all make the same mistake, one tells of it."""
    if _group_store is None:
        return True
    try:
        return _group_store.add(f"{_SAID}{line}", 1) == 1
    except RuntimeError:  # whoever keeps the store has left already
        return True


def announce_stop() -> None:
    """Tell the other ranks that this one leaves because of a signal: what they wait for will not come."""
    if _group_store is not None:
        with suppress(RuntimeError):  # whoever keeps the store has left already
            _group_store.set(_STOPPING, "1")


@contextmanager
def _collective() -> Iterator[None]:
    """Around what waits for other ranks.

    Raises: RankError: one is gone or did not come in time. Preempted: it left because of a signal.
    """
    _write_pulse(0.0, is_waiting=True)
    try:
        yield
    except RuntimeError as error:
        if _is_stopping():
            raise Preempted(
                "another rank was stopped by a signal; the same command goes on from the last checkpoint"
            ) from None
        reason = str(error).split(". ")[0]
        raise RankError(f"rank {rank()}: another rank is gone, or did not come ({reason})") from None
    _write_pulse(0.0, is_waiting=False)


def _is_stopping() -> bool:
    try:
        return _group_store is not None and _group_store.check([_STOPPING])
    except RuntimeError:
        return False


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
    """Wait for every rank; on gloo the RankError after a short `timeout_s` names the ranks that did not come."""
    if not dist.is_initialized():
        return
    with _collective():
        if timeout_s > DEFAULT_TIMEOUT_S:  # longer than a collective takes on any backend
            wait_at_store(timeout_s)
        if dist.get_backend() == "gloo":
            shortest = min(timeout_s, DEFAULT_TIMEOUT_S)
            dist.monitored_barrier(timeout=timedelta(seconds=shortest), wait_all_ranks=True)
        else:
            dist.barrier()


def wait_at_store(timeout_s: float) -> None:
    """Wait for every rank at the group's store, which takes no device's time and has no timeout of its own.

    Raises: RuntimeError: after `timeout_s`, or soon after a rank left because of a signal.
    """
    assert _group_store is not None
    global _num_waits
    _num_waits += 1
    name = f"wait-{_num_waits}"
    if _group_store.add(name, 1) == dist.get_world_size():
        _group_store.set(f"{name}-over", "yes")
    ends = time.monotonic() + timeout_s
    while True:
        try:
            return _group_store.wait([f"{name}-over"], timedelta(seconds=min(timeout_s, STORE_POLL_S)))
        except dist.DistStoreError:
            if _is_stopping() or time.monotonic() > ends:
                raise


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; the same tensor is returned, on whatever device it is."""
    if dist.is_initialized():
        with _collective():
            moved = tensor.to(_communication_device())
            dist.all_reduce(moved)
            tensor.copy_(moved)
    return tensor


def counts_of_ranks(count: int) -> list[int]:
    """Every rank's count."""
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = count
    return all_reduce_sum(counts).tolist()


def all_gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks, one after the other; each rank may have another number of them."""
    if not dist.is_initialized():
        return tensor
    sizes = torch.zeros(world_size(), dtype=torch.int64)
    sizes[rank()] = len(tensor)
    all_reduce_sum(sizes)
    padded = tensor.new_zeros((int(sizes.max()), *tensor.shape[1:])).to(_communication_device())
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    with _collective():
        dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)]).to(tensor.device)


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
        with _collective():
            payload = _broadcast_bytes(payload)
    return json.loads(payload)


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give tensors rank 0's values, in place; every rank calls this with the same shapes in the same order."""
    if not dist.is_initialized():
        return
    with _collective(), torch.no_grad():
        for tensor in tensors:
            moved = tensor.detach().to(_communication_device())
            dist.broadcast(moved, src=0)
            tensor.copy_(moved)


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
