"""Every shipped experiment is a configuration that the schema takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from prlhf.config import config_from_dict, config_to_dict, load_config
from prlhf.engine.sweep import load_sweep


def base_of(path: Path) -> Path:
    return path.with_name(path.stem.split("_")[0] + ".yaml")


def reward_model_of(path: Path) -> Path:
    """The P-RM with a table of users on the rows of a reward model's experiment."""
    return path.with_name(f"{base_of(path).stem}_prm.yaml")


ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted(ROOT.glob("experiments/sweeps/*.yaml"))
EXPERIMENTS = [path for path in sorted(ROOT.glob("experiments/**/*.yaml")) if path not in SWEEPS]
VARIANTS = [path for path in EXPERIMENTS if "_" in path.stem and base_of(path).is_file()]


def test_there_are_experiments() -> None:
    names = {path.stem for path in EXPERIMENTS}
    suffixes = ("", "_vanilla", "_cluster", "_low_rank", "_history", "_prm", "_prm_vanilla")
    variants = {base + suffix for base in ("psoups", "tldr", "prism", "convarg") for suffix in suffixes}
    assert {*variants, "prism_text", "builtin_base"} <= names


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_experiment_parses(path: Path) -> None:
    config = load_config(path)
    assert config_from_dict(config_to_dict(config), "the same as a dict") == config


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_experiment_is_named_after_its_file(path: Path) -> None:
    """`make eval EXP=psoups` looks for runs/psoups, `make eval EXP=paper/psoups` for runs/paper_psoups."""
    parts = path.relative_to(ROOT / "experiments").with_suffix("").parts
    assert load_config(path).name == "_".join(parts)


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_variants_differ_from_their_experiment_in_method_and_users_alone(path: Path) -> None:
    variant, original = (config_to_dict(load_config(each)) for each in (path, base_of(path)))
    if variant["method"] in ("rm", "prm"):  # text suffers from adapters that a score does not mind
        original["model"]["lora"] = config_to_dict(load_config(reward_model_of(path)))["model"]["lora"]
    for part in ("seed", "data", "model"):
        assert variant[part] == original[part], part
    if variant["method"] not in ("rm", "prm"):  # a reward model has no beta and cannot answer
        assert variant["eval"] == original["eval"] and variant["loss"]["beta"] == original["loss"]["beta"]
    assert variant["train"]["batch_rows"] == original["train"]["batch_rows"]


@pytest.mark.parametrize("name", ["psoups", "psoups_cluster", "psoups_vanilla", "tldr", "tldr_vanilla", "convarg_prm"])
def test_accuracy_over_steps_can_be_drawn_of_the_experiments_in_the_report(name: str) -> None:
    """At least three points, on few enough rows that it costs little, some of them of steps with a checkpoint."""
    config = load_config(ROOT / "experiments" / f"{name}.yaml")
    steps, rows = config.eval.every_steps, config.eval.rows
    assert steps and rows and config.train.max_steps is not None
    num_evaluations = (config.train.max_steps - 1) // steps
    assert num_evaluations >= 3 and config.checkpoint.every_steps % steps == 0
    assert num_evaluations * rows < 0.11 * config.train.max_steps * config.train.batch_rows


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_parses_and_is_named_after_its_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(path)
    assert sweep.name == path.stem
    assert len(sweep.points) > 1
    assert len({point.config.seed for point in sweep.points}) >= 3, "an interval needs seeds"
