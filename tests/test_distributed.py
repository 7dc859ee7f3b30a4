"""Collectives agree on every rank, and are the identity without torchrun."""

from __future__ import annotations

import time

import pytest
import torch
from torch.distributed import TCPStore

from prlhf.distributed import (
    DEFAULT_TIMEOUT_S,
    all_reduce_any,
    all_reduce_sum,
    announce_stop,
    barrier,
    broadcast_,
    broadcast_object,
    counts_of_ranks,
    init_process_group,
    is_main,
    rank,
    teardown,
    wait_at_store,
    world_size,
)
from prlhf.errors import ConfigError, Preempted
from tests.run_distributed import run_distributed_test

NESTED = {"user_ids": ["Ā/../", "\u202e", "a\x00b", "😀" * 300], "best": 0.1 + 0.2, "step": 2**53 - 1, "none": None}


def _check_collectives() -> None:
    assert world_size() == 2
    assert is_main() == (rank() == 0)
    total = torch.tensor([1.0, 10.0]) * (rank() + 1)
    assert all_reduce_sum(total) is total
    assert total.tolist() == [3.0, 30.0]
    assert counts_of_ranks(rank() + 5) == [5, 6]
    assert all_reduce_any(rank() == 1)
    assert not all_reduce_any(False)
    assert broadcast_object(NESTED if is_main() else {"another": "value"}) == NESTED
    assert broadcast_object("" if is_main() else None) == ""
    parameters = [torch.nn.Parameter(torch.full((2,), float(rank()))), torch.nn.Parameter(torch.tensor(rank() + 3.0))]
    broadcast_(parameters)
    assert [parameter.tolist() for parameter in parameters] == [[0.0, 0.0], 3.0]
    barrier()
    began = time.monotonic()
    for late in (0, 1):
        time.sleep(0.3 * (rank() == late))
        wait_at_store(20.0)
    assert time.monotonic() - began > 0.55, "both waited for the other"
    if rank() == 0:
        with pytest.raises(RuntimeError):
            wait_at_store(0.2)
    barrier()


def _fail_on_rank_one() -> None:
    if rank() == 1:
        raise ZeroDivisionError("only here")
    barrier()


def _stay_away_on_rank_one() -> None:
    if rank() == 0:
        with pytest.raises(RuntimeError, match="Ranks 1 failed to pass"):
            barrier(timeout_s=0.5)
    else:
        time.sleep(1.5)


def _leave_on_rank_one() -> None:
    """Rank 1 says that a signal stopped it, and is gone when rank 0 waits for it."""
    if rank() == 1:
        announce_stop()
        return
    with pytest.raises(Preempted, match="another rank was stopped by a signal"):
        for _ in range(2):  # what was under way when it left may still succeed
            barrier(timeout_s=10)


def _come_late_on_rank_zero() -> None:
    if rank() == 0:
        time.sleep(7)
    barrier(timeout_s=DEFAULT_TIMEOUT_S + 1)


def _leave_a_long_wait_on_rank_one() -> None:
    if rank() == 1:
        announce_stop()
        time.sleep(5)  # its connections stay open for longer than the others should take to notice
        return
    began = time.monotonic()
    with pytest.raises(Preempted, match="another rank was stopped by a signal"):
        barrier(timeout_s=DEFAULT_TIMEOUT_S + 1)
    assert time.monotonic() - began < 5


def _join_through_the_launchers_store(port: int, restart_count: int) -> None:
    """As under `torchrun --max-restarts`: the launcher's store outlives the ranks and keeps what they wrote."""
    teardown()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        environment.setenv("TORCHELASTIC_RESTART_COUNT", str(restart_count))
        environment.setenv("MASTER_PORT", str(port))
        init_process_group("cpu", timeout_s=10)
    assert all_reduce_sum(torch.ones(())).item() == 2


def test_two_ranks_agree_on_every_collective() -> None:
    run_distributed_test(_check_collectives, 2)


def test_a_failure_on_one_rank_is_raised() -> None:
    with pytest.raises(AssertionError, match="rank 1:(.|\\n)*ZeroDivisionError: only here"):
        run_distributed_test(_fail_on_rank_one, 2)


def test_a_barrier_names_the_rank_that_did_not_come() -> None:
    run_distributed_test(_stay_away_on_rank_one, 2)


def test_a_rank_that_a_signal_stopped_stops_those_that_wait_for_it() -> None:
    run_distributed_test(_leave_on_rank_one, 2)


def test_a_long_wait_outlasts_the_collectives_timeout() -> None:
    run_distributed_test(_come_late_on_rank_zero, 2, timeout_s=5)


def test_a_rank_that_a_signal_stopped_ends_a_long_wait() -> None:
    run_distributed_test(_leave_a_long_wait_on_rank_one, 2)


@pytest.mark.slow
def test_a_restarted_group_does_not_meet_the_dead_one() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restart_count in (0, 1):
        run_distributed_test(_join_through_the_launchers_store, 2, store.port, restart_count)


def test_alone_every_collective_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    init_process_group("cpu")
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    values = torch.tensor([1.0, 2.0])
    assert all_reduce_sum(values) is values
    assert values.tolist() == [1.0, 2.0]
    assert (all_reduce_any(True), all_reduce_any(False)) == (True, False)
    assert broadcast_object(NESTED) == NESTED
    barrier()
    teardown()


def test_broadcast_gives_a_list_for_a_tuple_at_any_world_size() -> None:
    assert broadcast_object((1, 2)) == [1, 2]


def test_broadcast_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(TypeError):
        broadcast_object(object())


def test_half_an_environment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ConfigError, match="MASTER_PORT is not set"):
        init_process_group("cpu")
