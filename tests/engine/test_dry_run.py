"""A dry run tells what a run would do, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prlhf.config import dump_config
from prlhf.engine.dry_run import describe_job
from prlhf.engine.launch import main
from tests.tiny_run import Tiny, snapshot


@pytest.mark.parametrize("settings", [{}, {"method": "dpo"}, {"method": "sft"}, {"train__batch_rows": 64}])
def test_it_shows_the_resolved_configuration_and_the_sizes(tiny: Tiny, settings: dict[str, Any]) -> None:
    config = tiny.config(**settings)
    text = describe_job(config, Path("runs/tiny"))
    assert text.startswith(dump_config(config))
    assert "17 to train on" in text
    assert f"4 of {config.train.batch_rows} rows on 1 rank(s)" in text
    assert "s a step" in text


def test_it_writes_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny.write_config(tmp_path / "tiny.yaml")
    before = snapshot(tmp_path), snapshot(tiny.data), snapshot(tiny.model)
    assert main([config, "--dry-run"]) == 0
    assert (snapshot(tmp_path), snapshot(tiny.data), snapshot(tiny.model)) == before
    assert not (tmp_path / "runs").exists()


def test_it_leaves_an_earlier_run_alone(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml", train__max_steps=1)
    assert main([config, "--runs", str(tmp_path / "runs")]) == 0
    before = snapshot(tmp_path / "runs")
    capsys.readouterr()
    assert main([config, "--runs", str(tmp_path / "runs"), "--dry-run", "train.lr=0.5"]) == 0
    assert snapshot(tmp_path / "runs") == before
    assert f"{tmp_path / 'runs' / 'tiny'} (exists)" in capsys.readouterr().out
