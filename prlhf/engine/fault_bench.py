"""Where faults are tried: the tiny job, trained in forks under a supervisor, and compared with the undisturbed run."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prlhf.engine.faults import VARIABLE
from prlhf.engine.forked import ForkedProcess, fork_training, kill_later
from prlhf.engine.run_dir import METRICS
from prlhf.engine.supervise import run_ranks
from prlhf.engine.tiny_job import write_tiny_job
from prlhf.errors import Preempted, PrlhfError, RankError

HANG_AFTER_S = 3.0  # forks have nothing to wait for


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, all that its ranks and it wrote, seconds, whether a kill met its rank."""

    code: int
    text: str
    seconds: float
    killed: bool

    @property
    def errors(self) -> list[str]:
        """The error lines of all ranks."""
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


def run_name(*parts: object) -> str:
    """A run's name from what sets it apart: a fault, settings."""
    return "-".join(map(str, parts)).replace(":", "-").replace("=", "-").replace(" ", "-")


class Bench:
    """A folder with the tiny job and its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.config = folder / "tiny.yaml"
        self._whole: dict[tuple[int, tuple[str, ...]], str] = {}
        self._seconds: dict[tuple[int, tuple[str, ...]], float] = {}
        from prlhf.engine.trainer import REFERENCE_CACHE  # here, so that the forks find it imported

        self._reference_cache = self.runs / REFERENCE_CACHE
        ForkedProcess(lambda: 0 if write_tiny_job(folder) else 1, folder / "job.log").wait()

    def train(
        self,
        name: str,
        *settings: str,
        num_ranks: int = 1,
        fault: str = "",
        max_restarts: int = 0,
        kill: tuple[int, float] | None = None,
        file_limit: int | None = None,
        obeys_permissions: bool = False,
    ) -> Outcome:
        """`prlhf train` of the tiny job under a name, from its last checkpoint if it has one.

        Args:
            settings: further arguments, such as key=value.
            fault: of PRLHF_FAULT.
            kill: a rank, and after how many seconds it is killed.
            file_limit: bytes that a file may have; beyond, writing fails as on a full disk.
            obeys_permissions: of files, also as root.
        """
        if not (self.runs / name).exists():  # a new run makes its own reference pass, which a fault may be about
            shutil.rmtree(self._reference_cache, ignore_errors=True)
        log, began = self.folder / f"{name}.log", time.perf_counter()
        log.write_text("")
        kills: list[tuple[ForkedProcess, ForkedProcess]] = []  # a rank, and what kills it

        def start(environment: Mapping[str, str]) -> ForkedProcess:
            """One rank."""
            argv = [str(self.config), f"name={name}", "--runs", str(self.runs), *settings]
            child = fork_training(argv, {**environment, VARIABLE: fault}, log, file_limit, obeys_permissions)
            if kill is not None and environment["RANK"] == str(kill[0]) and not kills:
                kills.append((child, kill_later(child.pid, kill[1], log)))
            return child

        limits = {"num_ranks": num_ranks, "max_restarts": max_restarts}
        message, code = "", 0
        try:
            code = run_ranks(start, self.runs / name, **limits, hang_after_s=HANG_AFTER_S)
        except (PrlhfError, Preempted) as error:
            code, message = error.exit_code, f"error: {error}\n" if isinstance(error, RankError) else f"{error}\n"
        for _, killer in kills:
            killer.terminate()
            killer.wait()
        killed = any(killed_rank.poll() == -signal.SIGKILL for killed_rank, _ in kills)
        return Outcome(code, log.read_text(errors="replace") + message, time.perf_counter() - began, killed)

    def train_apart(self, name: str, **options: Any) -> ForkedProcess:
        """As `train`, in a process of its own, whose exit code is the command's."""
        return ForkedProcess(lambda: self.train(name, **options).code, self.folder / "apart.log")

    def whole(self, num_ranks: int = 1, settings: Sequence[str] = ()) -> str:
        """The weights of the undisturbed run."""
        kind = num_ranks, tuple(settings)
        if kind not in self._whole:
            name = run_name("whole", num_ranks, *settings)
            outcome = self.train(name, *settings, num_ranks=num_ranks)
            if outcome.code:
                raise RankError(f"the undisturbed run ended with exit code {outcome.code}: {outcome.text}")
            self._whole[kind] = self.weights(name)
            self._seconds[kind] = outcome.seconds
        return self._whole[kind]

    def whole_seconds(self, num_ranks: int = 1) -> float:
        """How long the undisturbed run took."""
        self.whole(num_ranks)
        return self._seconds[num_ranks, ()]

    def weights(self, name: str) -> str:
        """sha256 of the last checkpoint's tensors: weights, optimizer and random states."""
        digest = hashlib.sha256()
        for path in sorted(self.checkpoints(name)[-1].glob("*.safetensors")):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def checkpoints(self, name: str) -> list[Path]:
        """Checkpoint directories of a run, the oldest first."""
        return sorted((self.runs / name / "checkpoints").glob("step-*"))

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """What the run's steps wrote."""
        return [json.loads(line) for line in (self.runs / name / METRICS).read_text().splitlines()]

    def differences(self, name: str, num_ranks: int = 1, settings: Sequence[str] = ()) -> list[str]:
        """Resume a run; what is not as if it had never been disturbed."""
        outcome = self.train(name, *settings, num_ranks=num_ranks)
        if outcome.code:
            return [f"resume: exit {outcome.code}: {' '.join(outcome.errors)}"]
        whole = self.whole(num_ranks, settings)
        return [] if self.weights(name) == whole else ["resume: other weights"]

    def remove(self, name: str) -> None:
        """Delete a run."""
        shutil.rmtree(self.runs / name, ignore_errors=True)
        (self.folder / f"{name}.log").unlink(missing_ok=True)
