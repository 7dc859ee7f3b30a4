"""Training in another process: signals reach it, its exit code says how it ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from prlhf.config import dump_config
from prlhf.engine.child import SignalRelay, is_finished, train_in_child
from prlhf.engine.run_dir import RunDir
from prlhf.errors import Preempted
from tests.tiny_run import Tiny

# Ends with 75 once the signal has come, as a run that saves does; says when it is ready for it.
SAVES = """
import pathlib, signal, sys, time
def stop(number, frame):
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def signal_when(ready: Path, number: int) -> None:
    while not ready.exists():
        threading.Event().wait(0.01)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_process_that_trains(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    with SignalRelay() as relay:
        waiting = threading.Thread(target=signal_when, args=(tmp_path / "ready", number))
        waiting.start()
        assert relay.run([sys.executable, "-c", SAVES, str(tmp_path / "ready")]) == 75
        waiting.join()
        assert relay.is_set
    assert signal.getsignal(number) is before


def test_a_stopped_run_stops_what_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the signal came to this process, or to the one that trains alone."""
    relay = SignalRelay()
    monkeypatch.setattr(relay, "run", lambda command: 75)
    with pytest.raises(Preempted, match="the same command goes on"):
        train_in_child("x.yaml", [], tmp_path, relay)
    monkeypatch.setattr(relay, "run", lambda command: -signal.SIGTERM)  # it was still starting
    relay.is_set = True
    with pytest.raises(Preempted):
        train_in_child("x.yaml", [], tmp_path, relay)


def test_other_exit_codes_come_back(tmp_path: Path) -> None:
    assert SignalRelay().run([sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_a_run_is_finished_when_its_status_says_so_and_it_was_evaluated_under_the_same_configuration(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny.config()
    assert not is_finished(config, tmp_path / "none")
    with RunDir(tmp_path / "run", writes=True) as run_dir:
        run_dir.start(dump_config(config), step=0)
        assert not is_finished(config, tmp_path / "run")
        run_dir.set_status("finished", step=4)
    assert not is_finished(config, tmp_path / "run"), "it was not evaluated"
    (tmp_path / "run" / "eval").mkdir()
    (tmp_path / "run" / "eval" / "final.json").write_text("{}")
    assert is_finished(config, tmp_path / "run")
    assert is_finished(tiny.config(name="other"), tmp_path / "run"), "the name is the directory's"
    assert not is_finished(tiny.config(train__max_steps=5), tmp_path / "run")
    (tmp_path / "run" / "STATUS.json").write_text("[]")
    assert not is_finished(config, tmp_path / "run")
