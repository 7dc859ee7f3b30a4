"""A fault happens at its point, step and rank, once, and never by itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from prlhf.engine import faults
from prlhf.engine.faults import Fault, InjectedFault, arm_faults, parse_fault, reach
from prlhf.engine.trainer import train
from prlhf.errors import ConfigError
from tests.tiny_run import Tiny, checkpoints


def armed(monkeypatch: pytest.MonkeyPatch, text: str, restarts: str = "0") -> None:
    monkeypatch.setattr(faults, "_armed", None)
    monkeypatch.setenv("PRLHF_FAULT", text)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    arm_faults()


def test_a_fault_is_read_from_its_four_parts() -> None:
    assert parse_fault("checkpoint_file_12:4:1:enospc") == Fault("checkpoint_file_12", 4, 1, "enospc")


@pytest.mark.parametrize(
    "text",
    ["eval", "eval:1:0", "eval:1:0:kill9:0", "nowhere:1:0:kill9", "eval:one:0:kill9", "eval:1:-1:kill9", "eval:1:0:x",
     "checkpoint_file:1:0:kill9", "checkpoint_file_<i>:1:0:kill9", "eval:1:0:nan", " eval:1:0:kill9", "eval:²:0:kill9"],
)
def test_a_malformed_fault_is_one_error(text: str) -> None:
    with pytest.raises(ConfigError, match="PRLHF_FAULT is .*expected point:step:rank:action") as caught:
        parse_fault(text)
    assert len(caught.value.messages) == 1
    assert caught.value.exit_code == 2


def acts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The actions from now on, which are noted and not done."""
    done: list[str] = []
    monkeypatch.setattr(faults, "_act", lambda action, parameters: done.append(action))
    return done


def test_nothing_happens_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    armed(monkeypatch, "")
    acted = acts(monkeypatch)
    reach("step_begin", step=1)
    assert not acted


def test_a_fault_happens_at_its_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    armed(monkeypatch, "before_optimizer:2:0:raise")
    for step in (1, 2):
        reach("step_begin", step=step)
        if step == 1:
            reach("before_optimizer")
    with pytest.raises(InjectedFault):
        reach("before_optimizer")
    reach("before_optimizer")


@pytest.mark.parametrize(("text", "restarts"), [("step_begin:1:1:raise", "0"), ("step_begin:1:0:raise", "1")])
def test_other_ranks_and_restarted_ones_are_spared(monkeypatch: pytest.MonkeyPatch, text: str, restarts: str) -> None:
    armed(monkeypatch, text, restarts)
    acted = acts(monkeypatch)
    reach("step_begin", step=1)
    assert not acted


def test_files_of_a_checkpoint_are_numbered_within_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    armed(monkeypatch, "checkpoint_file_1:4:0:enospc")
    for _ in range(3):
        reach("checkpoint_file", step=2)
    reach("checkpoint_file", step=4)
    with pytest.raises(OSError, match="No space left"):
        reach("checkpoint_file")


def test_nan_spoils_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    armed(monkeypatch, "after_backward:1:0:nan")
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[1].grad = torch.ones(2)
    reach("after_backward", step=1, parameters=parameters)
    assert parameters[0].grad is None
    assert parameters[1].grad.isnan().all()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_comes_twice(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    got: list[int] = []
    number = getattr(signal, name)
    before = signal.signal(number, lambda number, frame: got.append(number))
    armed(monkeypatch, f"eval:3:0:{name.lower()}")
    reach("eval", step=3)
    signal.signal(number, before)
    assert got == [number, number]


@pytest.mark.parametrize(
    ("fault", "kept"),
    [("reference:0:0:raise", []), ("step_begin:3:0:raise", [2]), ("after_backward:3:0:raise", [2]),
     ("before_optimizer:4:0:raise", [2]), ("checkpoint_file_6:4:0:raise", [2]), ("before_manifest:4:0:raise", [2]),
     ("before_rename:4:0:raise", [2]), ("after_rename:4:0:raise", [2, 4]), ("eval:2:0:raise", [2]),
     ("eval:4:0:raise", [2, 4])],
)
def test_training_reaches_every_point(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, kept: list[int]
) -> None:
    armed(monkeypatch, fault)
    with pytest.raises(InjectedFault):
        train(tiny.config(eval__every_steps=2), tmp_path / "run")
    if kept:
        found = [name for name in checkpoints(tmp_path / "run") if not name.startswith(".")]
        assert found == [f"step-{step:08d}" for step in kept]
    else:
        assert not (tmp_path / "run").exists()


def test_kill9_leaves_no_time_for_anything() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            faults._act("kill9", ())
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
