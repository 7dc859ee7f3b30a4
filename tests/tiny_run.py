"""A tiny random model, a small prepared data directory with two opposed users, and configurations of runs on them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from prlhf.config import Config, config_from_dict
from prlhf.data.world.tokenizer import train_tokenizer
from prlhf.engine import trainer
from prlhf.engine.build import Job, build_job
from prlhf.sharding import shard_like

THINGS = ["tea", "rain", "a long road", "chess", "the moon at night", "bread", "old maps", "a clock", "bees"]
EVAL_THINGS = ["snow", "a very old ship", "ink"]
NUM_TRAIN_ROWS = 17  # batches of 4 and of 8 leave a last one with a single row: fewer than two ranks
MAX_POSITIONS = 512


def short_answer(thing: str) -> str:
    return f"It is {thing}."


def long_answer(thing: str) -> str:
    return f"Well, {thing}: there is much to say, and more of {thing} later."


def preference_record(thing: str, user_id: str, *, prefers_short: bool) -> dict[str, Any]:
    answers = [short_answer(thing), long_answer(thing)]
    chosen, rejected = answers if prefers_short else answers[::-1]
    return {"user_id": user_id, "prompt": f"Tell me about {thing}", "chosen": chosen, "rejected": rejected}


def opposed_records(things: list[str]) -> list[dict[str, Any]]:
    """A judgement of ann, who likes short answers, and of bob, who does not, about everything."""
    return [
        preference_record(thing, user, prefers_short=user == "ann") for thing in things for user in ("ann", "bob")
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_data(directory: Path) -> Path:
    """A prepared directory: 17 training rows, 2 of dev, 6 of seen users, 2 of an unseen one."""
    directory.mkdir()
    write_jsonl(directory / "train.jsonl", opposed_records(THINGS)[:NUM_TRAIN_ROWS])
    write_jsonl(directory / "dev.jsonl", opposed_records(["a kite"]))
    write_jsonl(directory / "eval_seen.jsonl", opposed_records(EVAL_THINGS))
    unseen = [preference_record(thing, "cat", prefers_short=True) for thing in EVAL_THINGS[:2]]
    write_jsonl(directory / "eval_unseen.jsonl", unseen)
    return directory


def write_model(
    directory: Path, *, seed: int = 0, tokenizer: Any = None, max_positions: int = MAX_POSITIONS
) -> Path:
    """A Llama of two layers and width 32 with random weights, and a byte-level tokenizer unless one is given."""
    if tokenizer is None:
        answers = [answer(thing) for thing in THINGS for answer in (short_answer, long_answer)]
        tokenizer = train_tokenizer(answers, vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Tiny:
    """The folders of the tiny model and its data; picklable, so that other ranks can have it."""

    model: Path
    data: Path

    def values(self, **settings: Any) -> dict[str, Any]:
        """A configuration as nested dicts; `settings` by dotted key with "__" for the dots."""
        values: dict[str, Any] = {
            "name": "tiny",
            "seed": 1,
            "data": {"source": str(self.data), "max_tokens": 200, "max_prompt_tokens": 64},
            "model": {"backbone": str(self.model), "lora": {"rank": 2, "alpha": 4}},
            "user": {"num_user_tokens": 3, "num_clusters": 2},
            "train": {
                "max_steps": 4, "batch_rows": 4, "lr": 1e-2, "user_lr": 1e-2, "warmup_steps": 2, "log_every": 1,
                "device": "cpu",
            },
            "eval": {"max_new_tokens": 4},
            "checkpoint": {"every_steps": 2},
        }
        if settings.get("method") in ("dpo", "sft", "rm"):
            values["user"] = {"kind": "none"}
        for key, value in settings.items():
            *sections, name = key.split("__")
            holder = values
            for section in sections:
                holder = holder.setdefault(section, {})
            holder[name] = value
        return values

    def config(self, **settings: Any) -> Config:
        return config_from_dict(self.values(**settings), "tests/tiny_run.py")

    def write_config(self, path: Path, **settings: Any) -> str:
        path.write_text(yaml.safe_dump(self.values(**settings)), encoding="utf-8")
        return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny model and its data, made once."""
    root = tmp_path_factory.mktemp("tiny")
    return Tiny(write_model(root / "model"), write_data(root / "data"))


def perturb_(job: Job) -> Job:
    """Move every trained tensor off its starting value: at zero adapters half of the gradients would be zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in job.model.trainable().values():
            parameter.add_(shard_like(0.05 * torch.randn(parameter.shape, generator=generator), parameter))
    return job


def perturbed_job(config: Config) -> Job:
    """A job whose policy is no longer its reference."""
    return perturb_(build_job(config))


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file below a directory."""
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "STATUS.json").read_text())


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@contextmanager
def at_step(step: int, action: Callable[[], None]) -> Iterator[None]:
    """Inside, training calls `action` when it turns to the 0-based `step`."""
    batches_of_step = trainer.batches_of_step

    def with_action(job: Job, current: int) -> Any:
        if current == step:
            action()
        return batches_of_step(job, current)

    with mock.patch.object(trainer, "batches_of_step", with_action):
        yield


def stop_signal() -> None:
    """What a scheduler sends before it takes the machine away."""
    os.kill(os.getpid(), signal.SIGTERM)


class Crash(Exception):
    """A process that dies without a word."""


def crash() -> None:
    raise Crash
