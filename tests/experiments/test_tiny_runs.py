"""Every shipped experiment runs from its first step to its evaluation, with few steps, few rows and a small model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prlhf.config import load_config
from prlhf.data.load import load_preference_data, load_response_rows
from prlhf.data.prepared import write_prepared
from prlhf.data.records import PreferenceRow, record_from_row
from prlhf.engine.trainer import train
from prlhf.models.backbone import builtin_model_dir
from tests.tiny_run import Tiny, write_jsonl, write_model

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(ROOT.glob("experiments/*.yaml"))
NUM_USERS = 4
READ = {"on_bad_row": "error", "eval_prompts": 0.1}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers behind the built-in model's tokenizer and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_dir())
    return write_model(tmp_path_factory.mktemp("small") / "model", tokenizer=tokenizer, max_positions=1024)


def few(rows: list[PreferenceRow], users: list[str], count: int) -> list[PreferenceRow]:
    """Up to `count` rows of each of the users."""
    return [row for user in users for row in itertools.islice((row for row in rows if row.user_id == user), count)]


def few_rows(source: str, method: str, tiny: Tiny, directory: Path) -> Path:
    """Rows of the source, or the tiny world's where the source is a directory that a user prepares."""
    if not source.startswith("builtin:"):
        return tiny.data
    if method == "sft":
        rows, _ = load_response_rows(source, seed=0, **READ)
        return write_jsonl(directory / "text.jsonl", [record_from_row(row) for row in rows[:16]])
    data = load_preference_data(source, seed=0, unseen_users=0.1, **READ)
    seen = data.user_ids()[:NUM_USERS]
    unseen = sorted({row.user_id for row in data.eval_unseen})[:NUM_USERS]
    take = partial(few, users=seen)
    small = replace(
        data,
        train=take(data.train, count=6),
        dev=take(data.dev, count=1),
        eval_seen=take(data.eval_seen, count=3),
        eval_unseen=few(data.eval_unseen, unseen, 4),
        declared_users=tuple(seen),
    )
    write_prepared(directory / "data", small)
    return directory / "data"


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_runs_to_its_end(path: Path, tiny: Tiny, small_model: Path, tmp_path: Path) -> None:
    config = load_config(path)
    config = replace(
        config,
        data=replace(config.data, source=str(few_rows(config.data.source, config.method, tiny, tmp_path))),
        model=replace(config.model, backbone=str(small_model)),
        train=replace(config.train, max_steps=2, batch_rows=4, precision="fp32", device="cpu", log_every=1),
        eval=replace(config.eval, generate=min(config.eval.generate, 1), max_new_tokens=4),
    )
    final = train(config, tmp_path / "run")
    assert final["step"] == 2
    written = json.loads((tmp_path / "run" / "eval" / "final.json").read_text())
    assert written == json.loads(json.dumps(final))
    expected: Any = "dev" if config.method == "sft" else "accuracy"
    assert expected in final
