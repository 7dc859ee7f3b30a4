"""A training run in a process of its own: its peak memory, threads and random state are its own, too."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from prlhf.config import Config, changed_keys, load_config
from prlhf.engine.checkpoint import CONFIG
from prlhf.engine.run_dir import read_status
from prlhf.errors import ConfigError, Preempted
from prlhf.models.run_folder import FINAL


class Child(Protocol):
    """What is used of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...

    def terminate(self) -> None: ...


class SignalRelay:
    """SIGTERM and SIGINT inside the context are remembered, and passed on to the processes that train."""

    def __init__(self) -> None:
        self.is_set = False
        self.children: Sequence[Child] = ()

    def __enter__(self) -> SignalRelay:
        self._before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: object) -> None:
        self.is_set = True
        for child in self.children:
            child.terminate()

    def run(self, command: Sequence[str]) -> int:
        """Run a command without its standard output; the exit code."""
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
            self.children = [child]
            if self.is_set:  # it came while the process was being started
                child.terminate()
            code = child.wait()
        self.children = ()
        return code


def train_in_child(target: str, overrides: Sequence[str], runs: Path, relay: SignalRelay) -> int:
    """`prlhf train` in a process of its own; the exit code, if it was not stopped.

    Raises: Preempted: a signal came; the run was saved.
    """
    code = relay.run([sys.executable, "-m", "prlhf", "train", target, *overrides, "--runs", str(runs)])
    if relay.is_set or code == Preempted.exit_code:
        raise Preempted("stopped by a signal; what was trained is saved, the same command goes on from there")
    return code


def is_finished(config: Config, run_dir: Path) -> bool:
    """Whether the run directory holds the final evaluation of this very configuration."""
    if read_status(run_dir).get("status") != "finished" or not (run_dir / FINAL).is_file():
        return False
    try:
        return not set(changed_keys(load_config(run_dir / CONFIG), config)) - {"name"}
    except ConfigError:
        return False
