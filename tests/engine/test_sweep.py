"""A sweep trains each setting once, tabulates them all, and names every mistake before the first step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from prlhf.engine.child import SignalRelay
from prlhf.engine.sweep import load_sweep
from prlhf.errors import ConfigError
from tests.cli_run import Run, train_here
from tests.tiny_run import Tiny, at_step, checkpoints, read_status, snapshot, stop_signal


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(SignalRelay, "run", train_here)
    return Run(tiny, tmp_path, capsys)


def write_sweep(run: Run, **keys: Any) -> Path:
    base = run.config(train__max_steps=1, checkpoint__every_steps=0)
    path = run.folder / "sweep.yaml"
    values = {"name": "alphas", "base": base, **keys}
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False))
    return path


def test_runs_are_every_entry_with_every_combination(run: Run) -> None:
    path = write_sweep(
        run,
        runs=[{"user.kind": "cluster", "user.num_clusters": 3}, {"user.kind": "individual"}],
        grid={"loss.alpha": [0.25, 1], "model.lora.alpha": [8]},
    )
    points = load_sweep(path).points
    assert [point.config.name for point in points] == [
        "kind-cluster_num_clusters-3_loss.alpha-0.25_model.lora.alpha-8",
        "kind-cluster_num_clusters-3_loss.alpha-1_model.lora.alpha-8",
        "kind-individual_loss.alpha-0.25_model.lora.alpha-8",
        "kind-individual_loss.alpha-1_model.lora.alpha-8",
    ]
    config = points[1].config
    assert (config.user.kind, config.user.num_clusters, config.loss.alpha) == ("cluster", 3, 1.0)
    assert config.model.lora is not None and config.model.lora.alpha == 8.0


def test_values_of_every_kind_reach_the_configuration(run: Run) -> None:
    grid = {"train.lr": [1e-5], "model.lora": [None], "eval.rows": [7], "data.source": ["data/é ü"]}
    (point,) = load_sweep(write_sweep(run, grid=grid), ["train.user_lr=0.5"]).points
    config = point.config
    assert (config.train.lr, config.model.lora, config.eval.rows) == (1e-5, None, 7)
    assert (config.data.source, config.train.user_lr) == ("data/é ü", 0.5)
    assert config.name == "lr-1e-05_lora-null_rows-7_source-data"


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"grids": {}}, [["grids", "did you mean grid?"], ["runs, grid: neither"]]),
        ({"name": "a/b", "grid": {"seed": [1]}}, [["name: got 'a/b'", "letters"]]),
        ({"base": None, "grid": {"seed": [1]}}, [["base: got null"]]),
        ({"base": "nowhere.yaml", "grid": {"seed": [1, 2]}}, [["nowhere.yaml: no such file"]]),
        ({"grid": [1]}, [["grid: got [1]"]]),
        ({"grid": {"seed": 1}}, [["grid.seed: got 1", "list of values"]]),
        ({"grid": {"seed": []}}, [["grid.seed: got []"]]),
        ({"runs": []}, [["runs: got []"]]),
        ({"runs": [{"user": {"kind": "cluster"}}]}, [["runs.user", "user.kind"]]),
        ({"grid": {"model.lora": [{"rank": 2}]}}, [["grid.model.lora", "dotted key"]]),
        ({"runs": [{"seed": 1}], "grid": {"seed": [1]}}, [["seed: in both"]]),
        ({"grid": {"name": ["x"]}}, [["name is made from the values"]]),
        ({"grid": {"seed": list(range(40)), "loss.alpha": [0.5] * 40}}, [["makes 1600 runs", "at most 1000"]]),
        ({"grid": {"seed": [1, 1]}}, [["2 runs would be named seed-1"]]),
        ({"runs": [{"method": "sft", "user.kind": "none"}]}, [["sft", "no preference accuracy"]]),
        (
            {"grid": {"loss.alhpa": [0.1, 0.2], "train.lr": ["fast", 1], "loss.beta": [-1, 0]}},
            [["loss.alhpa", "did you mean loss.alpha?"], ["train.lr", "'fast'"], ["loss.beta", "-1"],
             ["loss.beta", "got 0"]],
        ),
    ],
)  # fmt: skip
def test_every_mistake_has_one_line(run: Run, keys: dict[str, Any], parts: list[list[str]]) -> None:
    lines = run.refused("sweep", write_sweep(run, **keys), "--runs", run.runs)
    assert len(lines) == len(parts), lines
    for expected, line in zip(sorted(parts), sorted(lines, key=lambda line: line.split(": ", 1)[1]), strict=True):
        assert "sweep.yaml" in line and all(part in line for part in expected), line
    assert not run.runs.exists()


def test_a_sweep_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping with keys from name, base, runs, grid"):
        load_sweep(tmp_path / "sweep.yaml")


def test_each_setting_is_trained_once_and_the_table_is_written_too(run: Run) -> None:
    path = write_sweep(run, grid={"loss.alpha": [0.0, 1.0], "seed": [1, 2]})
    code, table, _ = run("sweep", path, "--runs", run.runs)
    assert code == 0
    folder = run.runs / "alphas"
    names = ["alpha-0.0_seed-1", "alpha-0.0_seed-2", "alpha-1.0_seed-1", "alpha-1.0_seed-2"]
    assert sorted(path.parent.name for path in folder.glob("*/STATUS.json")) == names
    assert (folder / "sweep.md").read_text() == f"# alphas\n\n{table}"
    settings = json.loads((folder / "sweep.json").read_text())["settings"]
    assert [entry["runs"] for entry in settings] == [names[:2], names[2:]]
    finals = [json.loads((folder / name / "eval" / "final.json").read_text()) for name in names]
    means = [final["accuracy"]["seen"]["mean"] for final in finals]
    assert settings[0]["accuracy"]["values"] == means[:2]
    assert settings[1]["accuracy"]["mean"] == pytest.approx(sum(means[2:]) / 2)

    before = snapshot(run.runs)
    assert run("sweep", path, "--runs", run.runs)[:2] == (0, table)
    after = snapshot(run.runs)
    tables = {"alphas/sweep.json", "alphas/sweep.md"}
    assert {name for name in after if after[name] != before[name]} <= tables, "no run was touched"
    assert {name: content for name, (_, content) in after.items()} == {k: c for k, (_, c) in before.items()}


def test_an_interrupted_sweep_exits_with_75_and_goes_on(run: Run) -> None:
    path = write_sweep(run, grid={"seed": [1, 2]})
    arguments = ("sweep", path, "train.max_steps=3", "--runs", run.runs)
    with at_step(1, stop_signal):
        code, out, err = run(*arguments)
    assert (code, out) == (75, "")
    assert "the same command goes on" in err
    assert read_status(run.runs / "alphas" / "seed-1")["status"] == "preempted"
    assert not (run.runs / "alphas" / "seed-2").exists()
    assert run(*arguments)[0] == 0
    assert checkpoints(run.runs / "alphas" / "seed-2") == ["step-00000003"]


def test_a_run_that_fails_does_not_hold_up_the_others(run: Run) -> None:
    path = write_sweep(run, grid={"train.batch_rows": [4, 2], "data.source": [str(run.tiny.data), "/nowhere"]})
    code, table, err = run("sweep", path, "--runs", run.runs)
    assert code == 2
    settings, _, checks = table.split("\n\n")
    assert len(settings.splitlines()) == 2 + 2
    assert "| length alone, seen users " in checks, "of the runs that were finished"
    lines = [line for line in err.splitlines() if "training ended with exit code 2" in line]
    assert ["run 2 of 4: batch_rows-4_source-nowhere" in lines[0], "run 4 of 4" in lines[1]] == [True, True]


@pytest.mark.slow
def test_a_signal_to_the_sweep_saves_the_run_in_the_other_process(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny.write_config(tmp_path / "tiny.yaml", train__max_steps=100_000, checkpoint__every_steps=0)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"name": "s", "base": base, "grid": {"seed": [1, 2]}}))
    command = [sys.executable, "-m", "prlhf", "sweep", str(tmp_path / "sweep.yaml"), "--runs", str(tmp_path / "runs")]
    run_dir = tmp_path / "runs" / "s" / "seed-1"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as sweep:
        while not (run_dir / "metrics.jsonl").exists() and sweep.poll() is None:
            time.sleep(0.1)
        os.kill(sweep.pid, signal.SIGINT)
        _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 75, err
    assert "Traceback" not in err
    assert read_status(run_dir)["status"] == "preempted"
    assert len(checkpoints(run_dir)) == 1
    assert not (tmp_path / "runs" / "s" / "seed-2").exists()
