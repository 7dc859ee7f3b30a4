"""A run directory is read whole, finished or not; anything else is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from prlhf.errors import DataError
from prlhf.evaluation.run_files import read_runs
from tests.evaluation.runs import finished_run, write_run


def test_a_finished_run_has_everything(tmp_path: Path) -> None:
    (run,) = read_runs([finished_run(tmp_path / "mine")])
    assert (run.name, run.config) == ("mine", "name: exp\nseed: 3\n")
    assert [line["step"] for line in run.metrics] == [1, 2, 3]
    assert [evaluation["step"] for evaluation in run.evaluations] == [20, 100]
    assert run.final is not None and run.final["experiment"] == "exp"
    assert {who: len(rows) for who, rows in run.samples.items()} == {"policy": 4, "reference": 1}


def test_a_run_that_has_just_begun_has_nothing_yet(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", samples=False, evaluations=False)
    (folder / "metrics.jsonl").unlink()
    (run,) = read_runs([folder])
    assert (run.metrics, run.evaluations, run.final, run.samples) == ([], [], None, {})


def test_half_a_last_line_is_one_that_is_being_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (run,) = read_runs([folder])
    assert [line["step"] for line in run.metrics] == [1, 2, 3]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine")
    (folder / "samples" / "policy.jsonl").write_text("{}\n{\n")
    with pytest.raises(DataError, match=r"policy.jsonl:2: not valid JSON"):
        read_runs([folder])


def test_runs_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / part / "mine") for part in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_every_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_runs([tmp_path / "none", write_run(tmp_path / "mine"), tmp_path])
    assert [message.split(":")[0] for message in caught.value.messages] == [str(tmp_path / "none"), str(tmp_path)]
