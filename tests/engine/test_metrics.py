"""metrics.jsonl: a line for each optimizer step, means over the rows of the global step."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from prlhf.engine.checkpoint import Progress
from prlhf.engine.metrics import StepMetrics
from prlhf.engine.run_dir import RunDir
from prlhf.engine.step import StepResult
from prlhf.engine.trainer import train
from tests.engine.two_ranks import read, still
from tests.tiny_run import NUM_TRAIN_ROWS, Tiny, read_metrics

TRL_NAMES = {
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
    "grad_norm", "learning_rate",
}


def result_of(loss: float, *, num_rows: int, grad_norm: float = 1.0, skipped: bool = False) -> StepResult:
    sums = {"loss": torch.tensor(loss)}
    return StepResult(sums=sums, num_rows=num_rows, grad_norm=torch.tensor(grad_norm), skipped=skipped)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path, writes=True)


def test_figures_are_means_over_rows(run_dir: RunDir) -> None:
    metrics = StepMetrics(run_dir, ["loss"], log_every=10)
    metrics.add(Progress(step=1, rows_seen=4), result_of(6.0, num_rows=4), lr=0.1)
    metrics.add(Progress(step=2, rows_seen=5), result_of(2.0, num_rows=1), lr=0.2)
    shown = metrics.flush(2, 9, to_terminal=True)
    lines = read_metrics(run_dir.path)
    assert [(line["step"], line["loss"], line["rows"], line["learning_rate"]) for line in lines] == [
        (1, 1.5, 4, 0.1), (2, 2.0, 5, 0.2),
    ]
    assert shown == {"loss": "1.7500"}


def test_nothing_is_written_between_log_intervals_and_nothing_twice(run_dir: RunDir) -> None:
    metrics = StepMetrics(run_dir, ["loss"], log_every=3)
    assert [step for step in range(1, 8) if metrics.is_due(step)] == [3, 6]
    metrics.add(Progress(step=1), result_of(1.0, num_rows=1), lr=0.1)
    assert not (run_dir.path / "metrics.jsonl").exists()
    metrics.flush(1, 9, to_terminal=True)
    metrics.flush(1, 9, to_terminal=True)
    assert len(read_metrics(run_dir.path)) == 1


def test_a_figure_that_is_not_finite_is_null_and_valid_json(run_dir: RunDir) -> None:
    metrics = StepMetrics(run_dir, ["loss"], log_every=1)
    metrics.add(Progress(step=1), result_of(math.nan, num_rows=2, grad_norm=math.inf, skipped=True), lr=0.1)
    metrics.flush(1, 9, to_terminal=True)
    text = (run_dir.path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    line = read_metrics(run_dir.path)[0]
    assert (line["loss"], line["grad_norm"], line["skipped"]) == (None, None, True)


def test_two_ranks_see_each_row_of_an_epoch_once(two_ranks: Path) -> None:
    first, second = read(two_ranks, "rows")
    assert sorted(row for step in (*first, *second) for row in step) == list(range(NUM_TRAIN_ROWS))
    assert [len(step) for step in first] == [2, 2, 2, 2, 0]
    assert [len(step) for step in second] == [2, 2, 2, 2, 1]


def test_metrics_are_the_same_at_world_size_1_and_2(tiny: Tiny, two_ranks: Path, tmp_path: Path) -> None:
    """At rate 0, so that each line depends on its rows alone; 1e-6 is the rounding of float32 sums."""
    train(still(tiny), tmp_path / "still")
    alone, together = read_metrics(tmp_path / "still"), read_metrics(two_ranks / "still")
    assert [line["rows"] for line in alone] == [4, 8, 12, 16, 17]
    assert alone[0].keys() >= TRL_NAMES | {"individual/rewards/margins", "generic/rewards/margins"}
    for expected, actual in zip(alone, together, strict=True):
        for line in (expected, actual):
            del line["seconds"]
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_figure_with_a_count_of_its_own_is_a_mean_over_those_rows(run_dir: RunDir) -> None:
    """6 over 2 of 4 rows; none of 1 row has no mean."""
    metrics = StepMetrics(run_dir, ["up", "ups"], counts={"up": "ups"}, log_every=10)
    for num_ups, num_rows in ((2.0, 4), (0.0, 1)):
        sums = {"up": torch.tensor(3.0 * num_ups), "ups": torch.tensor(num_ups)}
        metrics.add(Progress(), StepResult(sums=sums, num_rows=num_rows, grad_norm=torch.tensor(1.0)), lr=0.1)
    metrics.flush(2, 9, to_terminal=True)
    assert [(line["up"], line["ups"]) for line in read_metrics(run_dir.path)] == [(3.0, 0.5), (None, 0.0)]
