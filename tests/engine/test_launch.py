"""`prlhf train --nproc`: processes of their own, begun again after one has died."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_run import Run
from tests.tiny_run import Tiny, checkpoints, read_metrics, read_status


@pytest.mark.slow
def test_a_killed_rank_is_begun_again(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml")
    command = [sys.executable, "-m", "prlhf", "train", config, "--runs", str(tmp_path)]
    environment = {**os.environ, "PRLHF_FAULT": "step_begin:3:1:kill9", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--nproc", "2", "--max-restarts", "1"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "was killed by SIGKILL; restart 1 of 1" in done.stderr
    assert "resumed from" in done.stderr
    assert read_status(tmp_path / "tiny")["status"] == "finished"
    assert checkpoints(tmp_path / "tiny") == ["step-00000002", "step-00000004"]
    assert [line["step"] for line in read_metrics(tmp_path / "tiny")] == [1, 2, 3, 4]


def test_two_ranks_tell_of_a_mistake_once(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", train__batch_rows=7)
    command = [sys.executable, "-m", "prlhf", "train", config, "--runs", str(tmp_path / "runs"), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: train.batch_rows")
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists()


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tiny, tmp_path, capsys)


@pytest.mark.parametrize("option", [("--nproc", 0), ("--max-restarts", -1), ("--hang-after", 0)])
def test_numbers_out_of_range_are_refused(run: Run, option: tuple[str, int]) -> None:
    (message,) = run.refused("train", run.config(), *option, "--runs", run.runs)
    assert option[0] in message


def test_a_malformed_fault_is_refused_before_anything_begins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRLHF_FAULT", "somewhere")
    (message,) = run.refused("train", run.config(), "--nproc", 2, "--runs", run.runs)
    assert "PRLHF_FAULT" in message
    assert not run.runs.exists()
