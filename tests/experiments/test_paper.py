"""The paper's full-size settings fit a model of their family and data of their kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prlhf.config import load_config
from tests.cli_run import Run
from tests.policies import save_folder
from tests.tiny_run import Tiny, write_data

PAPER = Path(__file__).resolve().parents[2] / "experiments" / "paper"
FAMILIES = {"psoups": ("llama", "plain"), "tldr": ("gptj", "plain"), "prism": ("llama", "chat")}
# beta, epochs, longest prompt and sequence (method and table of the paper, section 5 and appendix)
SETTINGS = {"psoups": (0.1, 2, 200, 1000), "tldr": (0.5, 2, 550, 600), "prism": (0.5, 1, 470, 770)}
FILES = sorted(PAPER.glob("*.yaml"))


def experiment_of(path: Path) -> str:
    return path.stem.split("_")[0].removesuffix("40")


def write_dialogues(directory: Path) -> Path:
    """Prepared data whose prompts are dialogues of users who say something of themselves."""
    write_data(directory)
    for path in directory.iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            turns = [("user", "Hello"), ("assistant", "Good day"), ("user", row["prompt"])]
            row["prompt"] = [{"role": role, "content": content} for role, content in turns]
            row["user_text"] = f"I am {row['user_id']}."
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_every_experiment_of_the_paper_is_there() -> None:
    individual = {"psoups", "tldr", "tldr40", "prism"}
    assert {path.stem for path in FILES} == individual | {f"{name}_vanilla" for name in individual} | {"prism_cluster"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_settings_are_the_papers(path: Path) -> None:
    config = load_config(path)
    beta, epochs, max_prompt_tokens, max_tokens = SETTINGS[experiment_of(path)]
    assert (config.loss.beta, config.train.epochs, config.train.max_steps) == (beta, epochs, None)
    assert (config.data.max_prompt_tokens, config.data.max_tokens) == (max_prompt_tokens, max_tokens)
    assert (config.train.lr, config.train.warmup_steps, config.seed) == (5e-5, 150, 123)
    assert config.train.batch_rows == 16, "the authors count the two terms of a row apart"
    assert config.train.precision == "bf16"
    assert (config.eval.repetition_penalty, config.eval.no_repeat_ngram_size) == (1.15, 3)
    lora = config.model.lora
    expected = (8, 32.0, 0.1) if experiment_of(path) == "psoups" else (8, 16.0, 0.05)
    assert lora is not None and (lora.rank, lora.alpha, lora.dropout) == expected
    if config.method == "pdpo":
        assert (config.loss.alpha, config.user.num_user_tokens, config.train.user_lr) == (0.5, 10, 5e-5)
    if config.user.kind == "cluster":
        assert config.user.num_clusters == 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_dry_run_with_a_local_model_passes(
    path: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, variant = FAMILIES[experiment_of(path)]
    folder = save_folder(tmp_path / "model", family=family, variant=variant, positions=2048)
    data = write_dialogues(tmp_path / "data") if variant == "chat" else write_data(tmp_path / "data")
    run = Run(tiny, tmp_path, capsys)
    overrides = (f"model.backbone={folder}", f"data.source={data}", "train.device=cpu")
    code, out, err = run("train", path, "--dry-run", *overrides, "--runs", run.runs)
    assert code == 0, err
    assert "17 to train on; dropped: none" in out
