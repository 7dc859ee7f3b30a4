"""The command line, called in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from prlhf.cli import main
from tests.tiny_run import Tiny


def train_here(relay: object, command: list[str]) -> int:
    """`SignalRelay.run` in this process instead of another one, which takes seconds to start."""
    assert command[:4] == [sys.executable, "-m", "prlhf", "train"]
    with contextlib.redirect_stdout(io.StringIO()):
        return main(command[3:])


class Run:
    """Calls the command in this process, in a folder of its own."""

    def __init__(self, tiny: Tiny, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.tiny = tiny
        self.folder = folder
        self.runs = folder / "runs"
        self._capsys = capsys

    def __call__(self, *argv: object) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._capsys.readouterr()
        code = main([str(argument) for argument in argv])
        out, err = self._capsys.readouterr()
        return code, out, err

    def config(self, **settings: Any) -> str:
        return self.tiny.write_config(self.folder / "tiny.yaml", **settings)

    def train(self, *overrides: str, **settings: Any) -> tuple[int, str, str]:
        return self("train", self.config(**settings), *overrides, "--runs", self.runs)

    def refused(self, *argv: object, code: int = 2) -> list[str]:
        """The error lines of a command that must fail, without "error: "."""
        got, _, err = self(*argv)
        assert got == code
        assert "Traceback" not in err
        return [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="session")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs `tiny` (pdpo), `vanilla` (dpo), `reward` (prm) and `plain` (rm)."""
    folder = tmp_path_factory.mktemp("trained")
    for name, method in {"tiny": "pdpo", "vanilla": "dpo", "reward": "prm", "plain": "rm"}.items():
        config = tiny.write_config(folder / f"{name}.yaml", name=name, train__max_steps=2, method=method)
        assert main(["train", config, "--runs", str(folder)]) == 0
    return folder
