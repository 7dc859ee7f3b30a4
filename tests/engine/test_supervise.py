"""A rank that dies or hangs ends the run by name, and is begun again where that was asked for."""

from __future__ import annotations

import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from prlhf import distributed
from prlhf.distributed import barrier, beat, init_process_group, start_pulse, teardown
from prlhf.engine.forked import ForkedProcess
from prlhf.engine.launch import report_errors
from prlhf.engine.run_dir import RunDir
from prlhf.engine.supervise import run_ranks
from prlhf.errors import ConfigError, Preempted, RankError
from tests.tiny_run import read_status

HANG_AFTER_S = 1.0
Work = Callable[[int, int], int]  # rank, how often it was begun again -> exit code


def supervise(tmp_path: Path, work: Work, *, num_ranks: int = 2, max_restarts: int = 0) -> int:
    """Ranks that are forks of the test and do `work` after their first beat."""

    def start(environment: Mapping[str, str]) -> ForkedProcess:
        def call() -> int:
            os.environ.update(environment)
            start_pulse()
            beat()
            return work(int(environment["RANK"]), int(environment["TORCHELASTIC_RESTART_COUNT"]))

        return ForkedProcess(call, tmp_path / f"log-{environment['RANK']}")

    return run_ranks(
        start, tmp_path / "run", num_ranks=num_ranks, max_restarts=max_restarts, hang_after_s=HANG_AFTER_S
    )


def wait_for_others() -> int:
    """As in a collective that will never end."""
    distributed._write_pulse(0.0, is_waiting=True)
    time.sleep(60)
    return 0


def be_killed() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_ranks_that_all_succeed_are_a_success(tmp_path: Path) -> None:
    assert supervise(tmp_path, lambda rank, restarts: 0) == 0


def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 1 \(process \d+\) was killed by SIGKILL; the same command goes on"):
        supervise(tmp_path, lambda rank, restarts: be_killed() if rank else wait_for_others())
    assert time.monotonic() - began < 20


def test_a_rank_that_lost_another_is_not_blamed(tmp_path: Path) -> None:
    """It ended in a collective, with exit code 1; the other one ended by itself."""

    def work(rank: int, restarts: int) -> int:
        distributed._write_pulse(0.0, is_waiting=rank == 0)
        return 1

    with pytest.raises(RankError, match=r"^rank 1 \(process \d+\) ended with exit code 1; "):
        supervise(tmp_path, work)


def test_a_hung_rank_is_named_not_the_one_that_waits_for_it(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"^rank 1 \(process \d+\).*: no sign of life") as caught:
        supervise(tmp_path, lambda rank, restarts: wait_for_others() if rank == 0 else time.sleep(60) or 0)
    assert "rank 0" not in str(caught.value)


def test_ranks_that_wait_for_each_other_are_named(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"^rank 0 .*, rank 1 .*: no sign of life"):
        supervise(tmp_path, lambda rank, restarts: wait_for_others())


def work_hard(rank: int, restarts: int) -> int:
    end = time.monotonic() + 4 * HANG_AFTER_S
    while time.monotonic() < end:
        sum(range(10_000))
    return 0


def wait_patiently(rank: int, restarts: int) -> int:
    beat(patience_s=60)
    time.sleep(3 * HANG_AFTER_S)
    return 0


def beat_often(rank: int, restarts: int) -> int:
    for _ in range(15):
        beat()
        time.sleep(HANG_AFTER_S / 5)
    return 0


@pytest.mark.parametrize("work", [work_hard, wait_patiently, beat_often])
def test_what_works_or_beats_or_said_so_is_not_hung(tmp_path: Path, work: Work) -> None:
    assert supervise(tmp_path, work, num_ranks=1) == 0


def test_a_dead_rank_is_begun_again_as_often_as_asked(tmp_path: Path) -> None:
    assert supervise(tmp_path, lambda rank, restarts: be_killed() if restarts < 2 else 0, max_restarts=2) == 0
    with pytest.raises(RankError):
        supervise(tmp_path, lambda rank, restarts: be_killed() if restarts < 2 else 0, max_restarts=1)


@pytest.mark.parametrize("code", [2, 3])
def test_a_mistake_is_not_made_again(tmp_path: Path, code: int) -> None:
    assert supervise(tmp_path, lambda rank, restarts: 0 if restarts else code, max_restarts=3) == code


def stop_saving(rank: int, restarts: int) -> int:
    """Rank 1 was stopped; rank 0 looks at its own signal in a while."""
    got = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: got.set())
    if rank == 1:
        return 75
    while not got.wait(0.01):
        beat()
    return 75


def test_a_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        supervise(tmp_path, stop_saving, max_restarts=3)


def report_mistakes(rank: int, restarts: int) -> int:
    """Both ranks find the same mistake, each another one as well; rank 0 has left before rank 1 speaks."""

    def find_mistakes(args: Namespace) -> int:
        init_process_group("cpu")
        barrier()
        teardown()
        time.sleep(rank / 2)
        raise ConfigError("train.batch_rows: odd", f"rank {rank} alone")

    return report_errors(find_mistakes, Namespace())


def test_a_mistake_of_all_ranks_is_told_once_and_that_of_one_rank_too(tmp_path: Path) -> None:
    assert supervise(tmp_path, report_mistakes) == 2
    told = [line for rank in range(2) for line in (tmp_path / f"log-{rank}").read_text().splitlines()]
    assert sorted(told) == ["error: rank 0 alone", "error: rank 1 alone", "error: train.batch_rows: odd"]


def test_what_a_killed_main_rank_could_not_write_stands_in_the_status(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run", writes=True) as run_dir:
        run_dir.start("", step=0)
    with pytest.raises(RankError):
        supervise(tmp_path, lambda rank, restarts: be_killed(), num_ranks=1)
    status = read_status(tmp_path / "run")
    assert status["status"] == "failed"
    assert "was killed by SIGKILL" in status["error"]
