"""The run directory: its lock, its status, its metrics."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from prlhf import __version__
from prlhf.errors import Preempted, RunDirError
from prlhf.files import LockFile, write_json_atomic, write_text_atomic
from prlhf.models.run_folder import FINAL, checkpoint_name

STATUS = "STATUS.json"
METRICS = "metrics.jsonl"
LOCK = ".lock"


class RunDir:
    """A run's directory, locked for as long as the context lasts; ranks that do not write do nothing.

    Nothing that an earlier run left is touched before `start`; a directory made here and never started is removed.

    Args:
        writes: True on the main rank alone.
    Raises: RunDirError: another process holds the lock, or the directory cannot be written.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self._lock = LockFile(path / LOCK, path, remedy="wait for it, or choose another name=")
        self._is_new = not path.exists()
        self._started = False

    def __enter__(self) -> RunDir:
        if self.writes:
            self._acquire_lock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self.writes:
            return
        if self._started and error is not None:
            self.set_status("preempted" if isinstance(error, Preempted) else "failed", error=str(error))
        self._lock.release()
        if self._is_new and not self._started:
            self.path.rmdir()

    def _acquire_lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise RunDirError(f"{self.path}: {error.strerror}; choose another name= or another --runs folder") from None

    def start(self, config_text: str, *, step: int) -> None:
        """Take the directory over: configuration, environment, status, and no figures of steps that come again."""
        self._started = True
        if self.writes:
            write_text_atomic(self.path / "config.yaml", config_text)
            write_json_atomic(self.path / "env.json", describe_environment())
            self._truncate_metrics(step)
            self._remove_evaluations(step)
            self.set_status("running", step=step)

    def set_status(self, status: str, **details: Any) -> None:
        """Replace STATUS.json: running, evaluating, finished, preempted or failed."""
        if self.writes:
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            write_json_atomic(self.path / STATUS, {"status": status, "time": now, **details})

    def is_finished(self, step: int) -> bool:
        """Whether an earlier run ended here with the evaluation of `step`, which is still there."""
        status = read_status(self.path)
        return (status.get("status"), status.get("step")) == ("finished", step) and (self.path / FINAL).is_file()

    def reopen(self) -> None:
        """There are steps to come, so a final evaluation that is here is no longer this run's."""
        if self.writes:
            for path in (self.path / FINAL, *(self.path / "samples").glob("*.jsonl")):
                path.unlink(missing_ok=True)

    def is_evaluated(self, step: int) -> bool:
        """Whether a step's evaluation on dev rows is there."""
        return (self.path / "eval" / f"{checkpoint_name(step)}.json").is_file()

    def append_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Append one JSON line for each optimizer step."""
        if self.writes:
            with (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def _truncate_metrics(self, step: int) -> None:
        path = self.path / METRICS
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_text_atomic(path, "".join(line + "\n" for line in kept))

    def _remove_evaluations(self, step: int) -> None:
        for path in (self.path / "eval").glob("step-*.json"):
            if path.stem > checkpoint_name(step):
                path.unlink()


def read_status(run_dir: Path) -> dict[str, Any]:
    """What STATUS.json says; nothing when it is missing or malformed."""
    try:
        status = json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # cut short by a crash: written again


def describe_environment() -> dict[str, Any]:
    """Versions and hardware, for env.json and `prlhf env`."""
    import numpy
    import safetensors
    import transformers

    return {
        "prlhf": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
