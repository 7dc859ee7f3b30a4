"""Training steps on one GPU: tokens/s, share of the machine's own bf16 matmul rate, peak memory.

    python -m benchmarks.gpu --out gpu.json      # under ten minutes; writes gpu.json and gpu.md

Models have the shapes of Llama-3.2-1B and Llama-3-8B and random weights, made on the device. A step is prlhf's own: 16
rows of P-DPO, both terms, packed, known log-probs of the reference, bf16 autocast, fused AdamW. Prompt and response of
every sequence have 1024 tokens together, the soft prompt included. LoRA keeps frozen weights in bf16; full fine-tuning
has float32 weights. Before every step the matmul rate is measured, and FLOPs are counted as in `benchmarks/cpu.py`: two
trees a row, nothing for recomputation or adapters. Micro-batches are halved until they fit.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import LlamaConfig

from benchmarks.cpu import matmul_rate, synchronize, useful_flops
from benchmarks.document import describe_run
from benchmarks.memory import memory_kib
from benchmarks.ways import ALPHA, BETA, NUM_USER_TOKENS, NUM_USERS, make_policy
from prlhf.data.collate import PairBatch, collate_pairs
from prlhf.data.tokenize import TokenizedPair
from prlhf.engine.build import make_autocast
from prlhf.engine.objective import Objective
from prlhf.engine.optim import RowLazyAdamW, make_optimizer
from prlhf.engine.reference import LiveReference, ReferenceTable
from prlhf.engine.step import train_step_
from prlhf.evaluation.report import make_table
from prlhf.models.flex_trees import BLOCK, is_served
from prlhf.models.lora import add_lora_
from prlhf.models.policy import PersonalizedPolicy

JOBS = {"1B-lora": ("1B", True), "1B-full": ("1B", False), "8B-lora": ("8B", True)}  # model, LoRA
WARM_UP = 2  # steps, in which kernels are compiled and memory is taken
FIRST_ORDINARY_TOKEN = 3


class Setting(NamedTuple):
    """What is the same for all jobs.

    Args:
        sequence_tokens: of a prompt and one response, soft prompt included.
        batch_rows: of a step.
        microbatch_rows: most rows at a time.
        probe: side of the largest matmul of which the rate is measured.
    """

    device: str
    models: dict[str, LlamaConfig]
    sequence_tokens: int
    batch_rows: int
    microbatch_rows: int
    probe: int
    repeats: int
    seed: int


def real_models() -> dict[str, LlamaConfig]:
    """The sizes of Llama-3.2-1B and Llama-3-8B."""
    common: dict[str, Any] = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8,
                              "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    return {
        "1B": LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True, **common
        ),
        "8B": LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, tie_word_embeddings=False, **common
        ),
    }


def tiny_models() -> dict[str, LlamaConfig]:
    """As `real_models`, for the CPU."""
    common: dict[str, Any] = {"vocab_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
                              "max_position_embeddings": 256, "num_hidden_layers": 2}
    return {
        "1B": LlamaConfig(hidden_size=64, intermediate_size=96, tie_word_embeddings=True, **common),
        "8B": LlamaConfig(hidden_size=96, intermediate_size=128, tie_word_embeddings=False, **common),
    }


def draw_rows(setting: Setting, vocab_size: int, count: int) -> list[TokenizedPair]:
    """Rows of random tokens; the prompt is a quarter to three quarters of a sequence."""
    rng = np.random.default_rng(setting.seed)
    length = setting.sequence_tokens

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(rng.integers(FIRST_ORDINARY_TOKEN, vocab_size, number).tolist())

    rows = []
    for row in range(count):
        prompt = int(rng.integers(length // 4, 3 * length // 4))
        response = length - NUM_USER_TOKENS - prompt
        user_id = int(rng.integers(1, NUM_USERS + 1))
        rows.append(TokenizedPair(row, user_id, (1, *tokens(prompt - 1)), tokens(response), tokens(response)))
    return rows


@dataclass
class Job:
    """A policy in training and the steps that it will make."""

    config: LlamaConfig
    policy: PersonalizedPolicy
    optimizer: RowLazyAdamW
    steps: list[list[TokenizedPair]]
    batches: list[list[PairBatch]]
    reference: ReferenceTable
    attention: str


def make_job(setting: Setting, model: str, *, lora: bool, microbatch_rows: int) -> Job:
    """A job before its first step; the reference's log-probs are known."""
    device, config = setting.device, setting.models[model]
    policy = make_policy(config, device=device, dtype=torch.bfloat16 if lora else torch.float32)
    if lora:
        add_lora_(policy.backbone, rank=8, alpha=16.0, dropout=0.0, targets="auto")
    rates = {"lr": 1e-5, "user_lr": 1e-3, "cluster_lr": 1e-3, "encoder_lr": 1e-3}
    optimizer = make_optimizer(policy.trainable(), weight_decay=0.0, **rates)
    count = setting.batch_rows
    rows = draw_rows(setting, config.vocab_size, (WARM_UP + setting.repeats) * count)
    steps = [rows[start : start + count] for start in range(0, len(rows), count)]
    batches = [
        [collate_pairs(step[i : i + microbatch_rows], pad_id=0).to(device) for i in range(0, count, microbatch_rows)]
        for step in steps
    ]
    live = LiveReference(policy.reference)
    with make_autocast("bf16", torch.device(device))():
        known = [live(batch) for step in batches for batch in step]
    reference = ReferenceTable(*(torch.cat(side).cpu() for side in zip(*known, strict=True)))
    dim = config.hidden_size // config.num_attention_heads
    query, key = (
        torch.empty(1, heads, BLOCK + 1, dim, device=device, dtype=torch.bfloat16)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    attention = "FlexAttention" if is_served(query, key) else "other"
    return Job(config, policy.train(), optimizer, steps, batches, reference, attention)


def time_step(setting: Setting, job: Job, step: int) -> tuple[float, float]:
    """Seconds of an optimizer step, and its mean loss.

    Raises: RuntimeError: loss or gradient is not finite.
    """
    device = setting.device
    synchronize(device)
    began = time.perf_counter()
    result = train_step_(
        job.policy,
        job.optimizer,
        Objective("pdpo", beta=BETA, alpha=ALPHA),
        job.batches[step],
        reference_of=job.reference,
        num_global_rows=setting.batch_rows,
        max_grad_norm=1.0,
        autocast=make_autocast("bf16", torch.device(device)),
    )
    synchronize(device)
    seconds = time.perf_counter() - began
    if result.skipped:
        raise RuntimeError(f"step {step}: loss or gradient is not finite; what it took says nothing")
    return seconds, float(result.sums["loss"]) / setting.batch_rows


def measure(setting: Setting, model: str, *, lora: bool, microbatch_rows: int) -> dict[str, Any]:
    """Medians over steps, the first ones left out.

    Raises: torch.OutOfMemoryError: the micro-batches do not fit.
    """
    device = setting.device
    job = make_job(setting, model, lora=lora, microbatch_rows=microbatch_rows)
    config, side = job.config, setting.probe
    width, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    probes = ((side, side, side), (2 * side, width, inner), (2 * side, inner, width), (side // 4, width, vocab))
    seconds, rates, tokens_per_s, shares, losses, peak = [], [], [], [], [], 0
    for step, rows in enumerate(job.steps):
        rate = matmul_rate(probes, device=device, dtype=torch.bfloat16)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken, loss = time_step(setting, job, step)
        losses.append(loss)
        peak = max(peak, peak_bytes(device))
        if step >= WARM_UP:
            seconds.append(taken)
            rates.append(rate)
            tokens_per_s.append(sum(map(num_positions, rows)) / taken)
            shares.append(useful_flops(rows, config, lora=lora) / taken / rate)
    return {
        "model": model,
        "train": "LoRA" if lora else "full",
        "microbatch_rows": microbatch_rows,
        "attention": job.attention,
        "step_s": statistics.median(seconds),
        "rows_per_s": setting.batch_rows / statistics.median(seconds),
        "tokens_per_s": statistics.median(tokens_per_s),
        "share_of_matmul_rate": statistics.median(shares),
        "matmul_tflops": statistics.median(rates) / 1e12,
        "peak_gib": peak / 2**30,
        "losses": losses,
    }


def num_positions(row: TokenizedPair) -> int:
    """Tokens of a row's two trees."""
    return 2 * (NUM_USER_TOKENS + len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids))


def peak_bytes(device: str) -> int:
    """Of the tensors on a GPU; of the process on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return memory_kib()["VmHWM"] * 1024


def measure_what_fits(setting: Setting, model: str, *, lora: bool) -> dict[str, Any]:
    """`measure` with the largest micro-batch that the device holds.

    Raises: torch.OutOfMemoryError: not even one row fits.
    """
    microbatch_rows = setting.microbatch_rows
    while True:
        try:
            return measure(setting, model, lora=lora, microbatch_rows=microbatch_rows)
        except torch.OutOfMemoryError:
            if microbatch_rows == 1:
                raise
        # Outside of the handler, whose traceback holds on to the tensors.
        microbatch_rows //= 2
        sys.stderr.write(f"{model}: out of memory; {microbatch_rows} rows at a time\n")
        gc.collect()
        torch.cuda.empty_cache()


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A row a job."""
    header = ["model", "trained", "rows at a time", "attention", "step s", "rows/s", "tokens/s",
              "share of the matmul rate", "matmul TFLOP/s", "peak GiB"]
    rows = [
        [
            result["model"],
            result["train"],
            str(result["microbatch_rows"]),
            result["attention"],
            f"{result['step_s']:.2f}",
            f"{result['rows_per_s']:.2f}",
            f"{result['tokens_per_s']:.0f}",
            f"{result['share_of_matmul_rate']:.2f}",
            f"{result['matmul_tflops']:.1f}",
            f"{result['peak_gib']:.1f}",
        ]
        for result in results
    ]
    return make_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every job; print a table, write it and the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="the same code on the CPU with tiny models, as a test")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the table goes beside it as .md")
    args = parser.parse_args(arguments)
    if args.tiny:
        setting = Setting("cpu", tiny_models(), 160, 4, 2, 64, args.repeats, args.seed)
    elif torch.cuda.is_available():
        setting = Setting("cuda", real_models(), 1024, 16, 8, 8192, args.repeats, args.seed)
    else:
        sys.exit("benchmarks.gpu: torch finds no CUDA device; --tiny runs the same code on the CPU")
    versions = {
        "device": torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "repeats": args.repeats,
        "seed": args.seed,
    }
    results: list[dict[str, Any]] = []
    for job in args.jobs:
        model, lora = JOBS[job]
        results.append(measure_what_fits(setting, model, lora=lora))
        figures = {"date": datetime.date.today().isoformat(), "setting": versions, "results": results}
        args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        about = describe_run("python -m benchmarks.gpu", **versions)
        args.out.with_suffix(".md").write_text(f"{about}\n\n{format_results(results)}\n", encoding="utf-8")
        gc.collect()
    sys.stdout.write(format_results(results) + "\n")


if __name__ == "__main__":
    main()
