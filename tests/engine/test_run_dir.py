"""The run directory: one process at a time, a status that tells how it ended, metrics without a step twice."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest

from prlhf.engine.run_dir import RunDir, describe_environment
from prlhf.errors import Preempted, RunDirError
from tests.tiny_run import read_status, snapshot


def test_a_directory_in_use_is_refused_with_its_holder_and_left_alone(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run", writes=True) as first:
        first.start("seed: 1\n", step=0)
        before = snapshot(tmp_path)
        with pytest.raises(RunDirError, match=f"in use by process {os.getpid()} on {platform.node()}"):
            RunDir(tmp_path / "run", writes=True).__enter__()
        assert snapshot(tmp_path) == before


def test_a_directory_is_free_again_after_use(tmp_path: Path) -> None:
    for _ in range(2):
        with RunDir(tmp_path / "run", writes=True) as run_dir:
            run_dir.start("seed: 1\n", step=0)


def test_a_lock_that_a_killed_process_left_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 on elsewhere")
    with RunDir(tmp_path, writes=True) as run_dir:
        run_dir.start("", step=0)


def test_a_start_that_fails_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunDir(tmp_path / "run", writes=True):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_an_earlier_run_as_it_was(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run", writes=True) as run_dir:
        run_dir.start("seed: 1\n", step=0)
        run_dir.append_metrics([{"step": 1}])
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError), RunDir(tmp_path / "run", writes=True):
        raise ZeroDivisionError
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("error", "status"), [(Preempted("a signal"), "preempted"), (ValueError("a bug"), "failed")])
def test_status_tells_how_a_started_run_ended(tmp_path: Path, error: Exception, status: str) -> None:
    with pytest.raises(type(error)), RunDir(tmp_path / "run", writes=True) as run_dir:
        run_dir.start("", step=0)
        assert read_status(tmp_path / "run")["status"] == "running"
        raise error
    assert read_status(tmp_path / "run")["status"] == status
    assert read_status(tmp_path / "run")["error"] == str(error)


def test_finished_means_finished_at_that_step(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path, writes=True)
    assert not run_dir.is_finished(4)
    run_dir.set_status("running", step=4)
    assert not run_dir.is_finished(4)
    run_dir.set_status("finished", step=4)
    assert not run_dir.is_finished(4), "its evaluation is gone"
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "final.json").write_text("{}")
    assert run_dir.is_finished(4)
    assert not run_dir.is_finished(2)
    (tmp_path / "STATUS.json").write_text('["finished"]')
    assert not run_dir.is_finished(4)


def test_starting_at_a_step_drops_the_metrics_behind_it(tmp_path: Path) -> None:
    """And the line that a crash cut in half."""
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": ')
    RunDir(tmp_path, writes=True).start("", step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])


def test_ranks_that_do_not_write_leave_no_trace(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run", writes=False) as run_dir:
        run_dir.start("", step=0)
        run_dir.append_metrics([{"step": 1}])
        run_dir.set_status("finished")
    assert not (tmp_path / "run").exists()


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=f"{tmp_path / 'file' / 'run'}: .*choose another name="):
        RunDir(tmp_path / "file" / "run", writes=True).__enter__()


def test_the_environment_fits_json_and_names_versions() -> None:
    environment = json.loads(json.dumps(describe_environment()))
    assert environment["python"].count(".") == 2
    assert {"prlhf", "torch", "transformers", "safetensors", "numpy", "platform", "cpu_count"} <= environment.keys()
