"""Several ranks of one machine under one command: a rank that dies or hangs ends the run by name, or is begun anew."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prlhf.distributed import PULSE, PULSE_VARIABLE, host_store
from prlhf.engine.child import Child, SignalRelay
from prlhf.engine.run_dir import RunDir, read_status
from prlhf.errors import NoCheckpointError, Preempted, PrlhfError, RankError

logger = logging.getLogger(__name__)

POLL_S = 0.1
LEAVE_S = 5.0  # how long ranks may take to notice that another one is gone
SAVE_S = 120.0  # how long they may take to notice that another one was stopped by a signal
STACK_S = 0.5  # how long a rank may take to write its stack
IDLE_CPU_S = 0.05  # work in `hang_after_s` seconds below which a silent rank does nothing

Start = Callable[[Mapping[str, str]], Child]


@dataclass
class Rank:
    """A rank that runs, and what is known of it."""

    number: int
    child: Child
    pulse: Path
    since: float = field(default_factory=time.monotonic)
    num_beats: int = 0
    cpu_s: float = 0.0
    patience_s: float = 0.0
    is_waiting: bool = False

    def __str__(self) -> str:
        name, code = f"rank {self.number} (process {self.child.pid})", self.child.poll()
        if not code:
            return name
        ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{name} {ending}"

    def look(self) -> None:
        """Take up its signs of life: beats, and time on the processor."""
        num_beats = 0
        if self.pulse.exists() and (data := self.pulse.read_bytes()):
            num_beats, self.patience_s, self.is_waiting = PULSE.unpack(data)
        cpu_s = _cpu_seconds(self.child.pid)
        if num_beats == 0 or num_beats != self.num_beats or cpu_s - self.cpu_s > IDLE_CPU_S:
            self.since, self.num_beats, self.cpu_s = time.monotonic(), num_beats, cpu_s

    def is_silent(self, hang_after_s: float) -> bool:
        """Whether it has done nothing for too long, since its first beat."""
        return time.monotonic() - self.since > hang_after_s + self.patience_s


def run_ranks(
    start: Start, run_dir: Path, *, num_ranks: int, max_restarts: int, hang_after_s: float
) -> int:
    """Run a group of ranks to its end, again after one has died or hung; the exit code.

    Args:
        start: begins a rank in the environment that it is given; a rank begun again goes on from the last checkpoint.
        hang_after_s: a rank that neither beats nor computes for so long counts as hung.
    Raises: RankError: a rank died or hung, and there are no restarts left. Preempted: a signal came.
    """
    with SignalRelay() as relay:
        for attempt in range(max_restarts + 1):
            codes, blame = _run_once(start, run_dir, relay, num_ranks, attempt, hang_after_s)
            if Preempted.exit_code in codes or (relay.is_set and any(codes)):
                raise Preempted("stopped by a signal; the same command goes on from the last checkpoint")
            mistakes = [code for code in codes if code in (PrlhfError.exit_code, NoCheckpointError.exit_code)]
            if mistakes or not any(codes):  # a mistake would be made again
                return mistakes[0] if mistakes else 0
            if attempt < max_restarts:
                logger.warning("%s; restart %d of %d", blame, attempt + 1, max_restarts)
    raise RankError(f"{blame}; the same command goes on from the last checkpoint")


def _run_once(
    start: Start, run_dir: Path, relay: SignalRelay, num_ranks: int, attempt: int, hang_after_s: float
) -> tuple[list[int], str]:
    """Exit codes of a group of ranks, and in words who was the first to fail."""
    store = host_store()  # not rank 0's: what one rank tells the others stays when rank 0 has left
    with tempfile.TemporaryDirectory(prefix="prlhf-") as folder:
        ranks = _start_ranks(start, num_ranks, attempt, store.port, Path(folder))
        relay.children = [rank.child for rank in ranks]
        if relay.is_set:  # it came while they were being started
            for rank in ranks:
                rank.child.terminate()
        try:
            hung = _wait(ranks, hang_after_s)
        finally:
            _end(ranks, signal.SIGKILL, LEAVE_S)
        for rank in ranks:
            rank.look()
    ended = [rank for rank in ranks if rank.child.poll()]
    guilty = hung or [rank for rank in ended if not rank.is_waiting] or ended
    names = ", ".join(map(str, guilty))
    blame = f"{names}: no sign of life for {hang_after_s:g} s, stacks are above" if hung else names
    could_tell = ranks[0] in guilty and ranks[0].child.poll() != -signal.SIGKILL
    if guilty and not could_tell and read_status(run_dir).get("status") in ("running", "evaluating", "failed"):
        RunDir(run_dir, writes=True).set_status("failed", error=blame)
    return [rank.child.poll() or 0 for rank in ranks], blame


def _start_ranks(start: Start, num_ranks: int, attempt: int, port: int, folder: Path) -> list[Rank]:
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    ranks = []
    for number in range(num_ranks):
        pulse = folder / f"rank-{number}"
        environment = {
            "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": attempt,
            "OMP_NUM_THREADS": threads, PULSE_VARIABLE: pulse,
        }
        child = start({name: str(value) for name, value in environment.items()})
        ranks.append(Rank(number, child, pulse))
    return ranks


def _wait(ranks: Sequence[Rank], hang_after_s: float) -> list[Rank]:
    """Wait until all have ended, or one has failed and the others had time to notice; returns who hangs, if any do."""
    while any(rank.child.poll() is None for rank in ranks):
        for rank in ranks:
            rank.look()
        codes = [rank.child.poll() for rank in ranks]
        if any(codes):
            if Preempted.exit_code in codes:  # a signal to one rank stops all
                _end(ranks, signal.SIGTERM, SAVE_S)
            else:
                _end(ranks, None, LEAVE_S)
            return []
        silent = [rank for rank in ranks if rank.child.poll() is None and rank.is_silent(hang_after_s)]
        hung = [rank for rank in silent if not rank.is_waiting]
        if hung or (silent and len(silent) == sum(code is None for code in codes)):
            _write_stacks(ranks)
            return hung or silent
        time.sleep(POLL_S)
    return []


def _end(ranks: Sequence[Rank], number: int | None, within_s: float) -> None:
    """Send all that run a signal, if one is given, and wait for them."""
    for rank in ranks:
        if number is not None and rank.child.poll() is None:
            rank.child.send_signal(number)
    deadline = time.monotonic() + within_s
    while any(rank.child.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _write_stacks(ranks: Sequence[Rank]) -> None:
    """Let each rank write where it is to standard error, one after the other."""
    for rank in ranks:
        if rank.child.poll() is None and rank.num_beats:
            logger.warning("%s is here:", rank)
            rank.child.send_signal(signal.SIGUSR1)
            time.sleep(STACK_S)


def _cpu_seconds(pid: int) -> float:
    """Processor time of a process so far; the clock where the system does not tell, so that nothing seems idle."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
