"""Which checkpoint a run directory stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prlhf.errors import CheckpointError
from prlhf.models.run_folder import FINAL, checkpoint_name, resolve_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (100, 20):
        (tmp_path / "checkpoints" / checkpoint_name(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".tmp-step-00000300").mkdir()
    (tmp_path / FINAL).parent.mkdir()
    return tmp_path


def write_final(run: Path, final: Any) -> None:
    (run / FINAL).write_text(json.dumps(final))


def test_without_a_final_evaluation_it_is_the_newest(run: Path) -> None:
    assert resolve_checkpoint(run).name == "step-00000100"
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run directory"):
        resolve_checkpoint(run / "checkpoints")


@pytest.mark.parametrize(
    ("final", "step"),
    [
        ({"step": 20, "last_step": 100}, 20),
        ({"step": 100, "last_step": 100}, 100),
        ({"step": 20, "last_step": 80}, 100),  # training has gone on since
        ({"step": 60, "last_step": 100}, 100),  # deleted since
        ({"step": 100}, 100),  # by a version that always took the last
        ({"step": "20", "last_step": [100]}, 100),
        ([], 100),
    ],
)
def test_what_the_final_evaluation_chose_is_taken_while_its_last_step_is_the_newest(run, final, step) -> None:
    write_final(run, final)
    assert resolve_checkpoint(run).name == checkpoint_name(step)


def test_a_final_evaluation_that_cannot_be_read_is_not_passed_over(run: Path) -> None:
    (run / FINAL).write_text('{"step": 20')
    with pytest.raises(CheckpointError, match="final.json: not valid JSON"):
        resolve_checkpoint(run)
    (run / "checkpoints" / checkpoint_name(20) / "state.json").write_text("{}")
    assert resolve_checkpoint(run / "checkpoints" / checkpoint_name(20)).name == checkpoint_name(20)
