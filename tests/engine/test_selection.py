"""`eval.select: dev`: a run ends with the checkpoint that is best on dev rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from prlhf.engine import selection, trainer
from prlhf.engine.dry_run import describe_job
from prlhf.engine.evaluate import evaluate_checkpoint
from prlhf.engine.trainer import train
from prlhf.errors import DataError
from prlhf.models import load_policy
from prlhf.models.assemble import load_model
from prlhf.models.run_folder import resolve_checkpoint
from tests.tiny_run import Tiny, checkpoints, read_metrics, write_data

SELECT: dict[str, Any] = {"eval__select": "dev", "eval__every_steps": 2, "checkpoint__keep_last": 1}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"model__lora": None},
    "cluster": {"user__kind": "cluster"},
    "reward": {"method": "prm"},
}
Accuracies = dict[int, float]


@contextmanager
def dev_accuracies(accuracies: Accuracies) -> Iterator[None]:
    """Inside, evaluations during training find these, by step."""

    def evaluate_step(job: Any, progress: Any, run_dir: Path, *, on_batch: Callable[[], None]) -> None:
        figures = {"step": progress.step, "accuracy": {"seen": {"mean": accuracies[progress.step]}}}
        (run_dir / "eval").mkdir(exist_ok=True)
        (run_dir / "eval" / f"step-{progress.step:08d}.json").write_text(json.dumps(figures))

    with mock.patch.object(trainer, "evaluate_step", evaluate_step), \
            mock.patch.object(selection, "evaluate_step", evaluate_step):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_the_final_evaluation_is_of_the_best_checkpoint_and_the_run_directory_stands_for_it(tiny, tmp_path, kind):
    run, evaluated, evaluate_run = tmp_path / "run", {}, trainer.evaluate_run

    def keep_weights(job: Any, *args: Any, **options: Any) -> dict[str, Any]:
        evaluated.update({name: tensor.detach().clone() for name, tensor in job.model.trainable().items()})
        return evaluate_run(job, *args, **options)

    with dev_accuracies({2: 0.9, 4: 0.4, 6: 0.8}), mock.patch.object(trainer, "evaluate_run", keep_weights):
        final = train(tiny.config(train__max_steps=6, **KINDS[kind], **SELECT), run)
    assert (final["step"], final["last_step"]) == (2, 6)
    assert checkpoints(run) == ["step-00000002", "step-00000006"]
    best, last = (load_model(run / "checkpoints" / name).trainable() for name in checkpoints(run))
    assert evaluated and all(torch.equal(tensor, best[name]) for name, tensor in evaluated.items())
    assert not any(torch.equal(tensor, last[name]) for name, tensor in evaluated.items())
    assert resolve_checkpoint(run).name == "step-00000002"
    again = evaluate_checkpoint(run, source=None, overrides=[])
    assert {key: again[key] for key in ("accuracy", "per_user")} == {
        key: final[key] for key in ("accuracy", "per_user")
    }


@pytest.mark.parametrize(
    ("accuracies", "step"), [({2: 0.4, 4: 0.9}, 4), ({2: 0.9, 4: 0.9}, 2), ({2: 0.9, 4: 0.4}, 2)]
)
def test_of_equal_ones_the_earliest_is_taken(tiny: Tiny, tmp_path: Path, accuracies: Accuracies, step: int) -> None:
    with dev_accuracies(accuracies):
        assert train(tiny.config(**SELECT), tmp_path / "run")["step"] == step


def test_the_last_step_is_evaluated_on_dev_rows_too(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.config(**SELECT), tmp_path / "run")
    evaluations = sorted((tmp_path / "run" / "eval").glob("step-*.json"))
    assert [path.name for path in evaluations] == ["step-00000002.json", "step-00000004.json"]
    assert all(json.loads(path.read_text())["accuracy"]["seen"]["num_rows"] == 2 for path in evaluations)


def test_a_damaged_checkpoint_is_not_chosen(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with dev_accuracies({2: 0.9, 4: 0.4}):
        train(tiny.config(**SELECT), run)
        (run / "eval" / "final.json").unlink()
        path = run / "checkpoints" / "step-00000002" / "trainable.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        assert train(tiny.config(**SELECT), run)["step"] == 4


def test_a_run_that_is_finished_stays_and_one_made_longer_goes_on_from_its_last_step(tiny, tmp_path):
    run = tmp_path / "run"
    with dev_accuracies({2: 0.9, 4: 0.4, 6: 0.95, 8: 0.3}):
        first = train(tiny.config(**SELECT), run)
        assert train(tiny.config(**SELECT), run) == first
        assert train(tiny.config(train__max_steps=8, **SELECT), run)["step"] == 6
        last = train(tiny.config(train__max_steps=8, checkpoint__keep_last=1), run)
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 9))
    assert (last["step"], last["last_step"]) == (8, 8), "eval.select may change on a finished run"
    assert resolve_checkpoint(run).name == "step-00000008"


def test_selection_changes_nothing_that_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    with dev_accuracies({2: 0.9, 4: 0.4}):
        train(tiny.config(**SELECT), tmp_path / "dev")
    train(tiny.config(), tmp_path / "last")
    one, other = (load_policy(tmp_path / name / "checkpoints" / "step-00000004") for name in ("dev", "last"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("call", [train, describe_job])
def test_data_without_dev_rows_is_refused(tiny: Tiny, tmp_path: Path, call: Callable[..., Any]) -> None:
    data = write_data(tmp_path / "data")
    (data / "dev.jsonl").write_text("")
    with pytest.raises(DataError, match=re.escape(f"data.source '{data}': has no dev rows")):
        call(tiny.config(data__source=str(data), **SELECT), tmp_path / "run")
