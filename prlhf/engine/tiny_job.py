"""A job of a second, made on the spot: what `prlhf selftest` trains, disturbed and undisturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from prlhf.yaml_strict import dump_yaml

NUM_STEPS = 6
CHECKPOINT_EVERY = 2
EVAL_STEP = 3
_THINGS = ("tea", "rain", "a long road", "chess", "the moon", "bread", "old maps", "a clock", "bees")


def write_tiny_job(folder: Path) -> Path:
    """Write a random model of 30,000 weights, 17 judgments of two opposed users and a configuration.

    Dropout is on, evaluation and generation are, too: whatever a resume could lose is there.

    Returns: the configuration's path.
    """
    _write_model(folder / "model")
    data = folder / "data"
    data.mkdir()
    for name, things in (("train", _THINGS), ("dev", ("a kite",)), ("eval_seen", ("snow", "ink"))):
        lines = [json.dumps(_judgment(thing, user)) + "\n" for thing in things for user in ("ann", "bob")]
        (data / f"{name}.jsonl").write_text("".join(lines[:17]), encoding="utf-8")
    path = folder / "tiny.yaml"
    path.write_text(dump_yaml(_settings(folder)), encoding="utf-8")
    return path


def _settings(folder: Path) -> dict[str, Any]:
    lora = {"rank": 2, "alpha": 4, "dropout": 0.1}
    return {
        "name": "tiny",
        "data": {"source": str(folder / "data"), "max_tokens": 200, "max_prompt_tokens": 64},
        "model": {"backbone": str(folder / "model"), "lora": lora},
        "user": {"num_user_tokens": 3, "init": "uniform"},
        "train": {
            "max_steps": NUM_STEPS, "batch_rows": 4, "lr": 1e-2, "user_lr": 1e-2, "warmup_steps": 2, "log_every": 1,
            "device": "cpu", "num_threads": 1,
        },
        "eval": {"every_steps": EVAL_STEP, "generate": 1, "few_shot": 0, "max_new_tokens": 4},
        "checkpoint": {"every_steps": CHECKPOINT_EVERY},
    }


def _judgment(thing: str, user: str) -> dict[str, str]:
    short, long = f"It is {thing}.", f"Well, {thing}: there is much to say, and more of {thing} later."
    chosen, rejected = (short, long) if user == "ann" else (long, short)
    return {"user_id": user, "prompt": f"Tell me about {thing}", "chosen": chosen, "rejected": rejected}


def _write_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from prlhf.data.world.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([_judgment(thing, "ann")["rejected"] for thing in _THINGS], vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
