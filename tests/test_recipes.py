"""`prlhf recipes`: what is shipped, listed and copied."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from prlhf import recipes
from prlhf.cli import main
from prlhf.config import load_config
from prlhf.engine.sweep import load_sweep
from prlhf.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1] / "experiments"


def test_ls_names_every_experiment_and_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == [str(path.relative_to(ROOT).with_suffix("")) for path in sorted(ROOT.rglob("*.yaml"))]
    assert all(len(line.split()) > 3 for line in lines), "each file begins with a comment"
    of_the_paper = next(line for line in lines if line.startswith("paper/psoups "))
    assert of_the_paper.endswith("Li et al. 2024 (README.md beside this file)")


def test_cp_copies_what_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cp", "psoups", "paper/tldr", "psoups", "--out", str(tmp_path / "mine")]) == 0
    copies = [tmp_path / "mine" / "psoups.yaml", tmp_path / "mine" / "paper" / "tldr.yaml"]
    assert capsys.readouterr().out.split() == list(map(str, copies))
    assert [load_config(path).name for path in copies] == ["psoups", "paper_tldr"]


def test_a_copied_sweep_varies_the_experiment_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "my runs"
    assert main(["recipes", "cp", "psoups", "sweeps/psoups_alpha", "--out", str(out)]) == 0
    sweep = load_sweep(out / "sweeps" / "psoups_alpha.yaml")
    assert sweep.base == str(out / "psoups.yaml") and len(sweep.points) > 1
    assert main(["recipes", "cp", "sweeps/psoups_alpha", "--out", str(tmp_path / "alone")]) == 0
    alone = tmp_path / "alone" / "sweeps" / "psoups_alpha.yaml"
    assert alone.read_text() == (ROOT / "sweeps" / "psoups_alpha.yaml").read_text()


def test_cp_refuses_unknown_names_and_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "psoups.yaml").write_text("mine")
    assert main(["recipes", "cp", "psoups", "prism", "poups", "../setup", "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and "no poups" in errors[0] and "no ../setup" in errors[1] and "exists" in errors[2]
    assert (tmp_path / "psoups.yaml").read_text() == "mine" and not (tmp_path / "prism.yaml").exists()


def test_an_installed_package_has_them_in_the_environments_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "site-packages" / "prlhf" / "recipes.py"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(ConfigError, match="no experiments in .*; install prlhf again"):
        recipes.list_recipes()
    shutil.copytree(ROOT, tmp_path / "data" / recipes.INSTALLED)
    assert "psoups" in recipes.list_recipes()
