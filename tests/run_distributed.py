"""Runs a function on several gloo ranks of this machine."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessException

from prlhf.distributed import init_process_group, teardown

COLLECTIVE_TIMEOUT_S = 60.0


def run_distributed_test(
    function: Callable[..., None], world_size: int, *args: Any, timeout_s: float = COLLECTIVE_TIMEOUT_S
) -> None:
    """Call `function(*args)` on every rank of a new group.

    Args:
        function: module-level, so that a fresh process can import it; asks prlhf.distributed for its rank.
        timeout_s: of a collective.
    Raises: AssertionError: with the trace of the rank that failed first, not of those that then missed it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        try:
            given = (world_size, port, folder, timeout_s, function, args)
            torch.multiprocessing.spawn(_run_rank, given, nprocs=world_size)
        except ProcessException as error:
            traces = sorted(Path(folder).iterdir())
            raise AssertionError(traces[0].read_text() if traces else str(error)) from None


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    timeout_s: float,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    try:
        init_process_group("cpu", timeout_s=timeout_s)
        function(*args)
    except BaseException:
        # Written before this process lets go of its connections: the others can only fail later.
        trace = f"rank {rank}:\n{traceback.format_exc()}"
        (Path(folder) / f"{time.monotonic_ns():020d}-{rank}").write_text(trace)
        raise
    teardown()
