"""Training steps on one GPU: tokens/s, share of the machine's own bf16 matmul rate, peak memory.

    python -m benchmarks.gpu --out gpu.json      # under ten minutes; writes gpu.json and gpu.md

Models have the shapes of Llama-3.2-1B and Llama-3-8B and random weights, made on the device. A step of prlhf's is 16
rows of P-DPO, both terms, packed, known log-probs of the reference, bf16 autocast, fused AdamW. Prompt and response of
every sequence have 1024 tokens together, the soft prompt included; the `tldr` jobs have rows of that shape as in
`benchmarks/cpu.py`, and one of them is TRL's DPOTrainer with known log-probs of the reference and every row twice,
where TRL is installed. LoRA keeps frozen weights in bf16; full fine-tuning has float32 weights. Before every step the
matmul rate is measured, and FLOPs are counted as in `benchmarks/cpu.py`: two trees a row, nothing for recomputation or
adapters. Micro-batches are halved until they fit.
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
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import transformers
from transformers import LlamaConfig

from benchmarks.cpu import matmul_rate, synchronize, useful_flops
from benchmarks.document import describe_run
from benchmarks.memory import memory_kib
from benchmarks.trl_way import TrlSteps
from benchmarks.ways import ALPHA, BETA, NUM_USER_TOKENS, NUM_USERS, has_trl, make_policy
from benchmarks.ways import draw_rows as draw_shaped_rows
from prlhf.data.collate import collate_pairs
from prlhf.data.tokenize import TokenizedPair
from prlhf.engine.build import make_autocast
from prlhf.engine.objective import Objective, ReferenceLogps
from prlhf.engine.optim import make_optimizer
from prlhf.engine.reference import LiveReference, ReferenceTable
from prlhf.engine.step import train_step_
from prlhf.evaluation.report import make_table
from prlhf.models.flex_trees import BLOCK, is_served
from prlhf.models.lora import add_lora_


class Work(NamedTuple):
    """What a job trains, on what and how.

    Args:
        shape: of the rows, one of `benchmarks.ways`; None: sequences of one length.
        by_trl: in TRL's DPOTrainer.
    """

    model: str
    lora: bool
    shape: str | None = None
    by_trl: bool = False


JOBS = {
    "1B-lora": Work("1B", lora=True),
    "1B-full": Work("1B", lora=False),
    "8B-lora": Work("8B", lora=True),
    "8B-lora-tldr": Work("8B", lora=True, shape="tldr"),
    "8B-lora-tldr-trl": Work("8B", lora=True, shape="tldr", by_trl=True),
}
WARM_UP = 2  # steps, in which kernels are compiled and memory is taken
FIRST_ORDINARY_TOKEN = 3
REAL_SEQUENCE_TOKENS = 1024


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


def draw_rows(setting: Setting, vocab_size: int, count: int, shape: str | None = None) -> list[TokenizedPair]:
    """Rows of random tokens; without a shape the prompt is a quarter to three quarters of a sequence."""
    rng = np.random.default_rng(setting.seed)
    length = setting.sequence_tokens
    if shape is not None:
        scale = length / REAL_SEQUENCE_TOKENS
        return draw_shaped_rows(shape, rng, count=count, vocab_size=vocab_size, scale=scale)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(rng.integers(FIRST_ORDINARY_TOKEN, vocab_size, number).tolist())

    rows = []
    for row in range(count):
        prompt = int(rng.integers(length // 4, 3 * length // 4))
        response = length - NUM_USER_TOKENS - prompt
        user_id = int(rng.integers(1, NUM_USERS + 1))
        rows.append(TokenizedPair(row, user_id, (1, *tokens(prompt - 1)), tokens(response), tokens(response)))
    return rows


class Job(Protocol):
    """A model in training and the steps that it will make."""

    config: LlamaConfig
    steps: list[list[TokenizedPair]]
    attention: str

    def run_step(self, step: int) -> float:
        """One optimizer step; returns its mean loss."""


class PrlhfJob:
    """A policy before its first step; the reference's log-probs are known."""

    def __init__(self, setting: Setting, work: Work, *, microbatch_rows: int) -> None:
        device, config = setting.device, setting.models[work.model]
        self.config, self.device, self.batch_rows = config, device, setting.batch_rows
        self.policy = make_policy(config, device=device, dtype=torch.bfloat16 if work.lora else torch.float32)
        if work.lora:
            add_lora_(self.policy.backbone, rank=8, alpha=16.0, dropout=0.0, targets="auto")
        rates = {"lr": 1e-5, "user_lr": 1e-3, "cluster_lr": 1e-3, "encoder_lr": 1e-3}
        self.optimizer = make_optimizer(self.policy.trainable(), weight_decay=0.0, **rates)
        self.steps = draw_steps(setting, work)
        self.batches = [
            [collate_pairs(rows, pad_id=0).to(device) for rows in cut(step, microbatch_rows)] for step in self.steps
        ]
        live = LiveReference(self.policy.reference)
        with make_autocast("bf16", torch.device(device))():
            known = [live(batch) for step in self.batches for batch in step]
        self.reference = ReferenceTable(*(torch.cat(side).cpu() for side in zip(*known, strict=True)))
        dim = config.hidden_size // config.num_attention_heads
        query, key = (
            torch.empty(1, heads, BLOCK + 1, dim, device=device, dtype=torch.bfloat16)
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.attention = "FlexAttention" if is_served(query, key) else "other"
        self.policy.train()

    def run_step(self, step: int) -> float:
        """As the engine trains.

        Raises: RuntimeError: loss or gradient is not finite.
        """
        result = train_step_(
            self.policy,
            self.optimizer,
            Objective("pdpo", beta=BETA, alpha=ALPHA),
            self.batches[step],
            reference_of=self.reference,
            num_global_rows=self.batch_rows,
            max_grad_norm=1.0,
            autocast=make_autocast("bf16", torch.device(self.device)),
        )
        if result.skipped:
            raise RuntimeError(f"step {step}: loss or gradient is not finite; what it took says nothing")
        return float(result.sums["loss"]) / self.batch_rows


class TrlJob:
    """TRL's DPOTrainer before its first step, on the rows of `PrlhfJob`; the reference's log-probs are known."""

    attention = "TRL"

    def __init__(self, setting: Setting, work: Work, *, microbatch_rows: int) -> None:
        device, self.config = setting.device, setting.models[work.model]
        self.batch_rows = setting.batch_rows
        policy = make_policy(self.config, device=device, dtype=torch.bfloat16 if work.lora else torch.float32)
        self.autocast = make_autocast("bf16", torch.device(device))
        options: dict[str, Any] = {"beta": BETA, "num_user_tokens": NUM_USER_TOKENS, "device": device}
        self.trl = TrlSteps(policy.backbone, lora=work.lora, in_place=True, **options)
        self.optimizer = torch.optim.AdamW(self.trl.parameters(), lr=1e-5, fused=True)
        self.steps = draw_steps(setting, work)
        self.microbatches = [cut(step, microbatch_rows) for step in self.steps]
        self.reference: list[list[ReferenceLogps]] = []
        with torch.no_grad(), self.autocast():
            for step in self.microbatches:
                sides = [self.trl.reference_logps(rows) for rows in step]
                self.reference.append([ReferenceLogps(*(side[: len(side) // 2] for side in both)) for both in sides])

    def run_step(self, step: int) -> float:
        """Micro-batches, one clipped gradient, one step of AdamW."""
        losses = []
        for rows, reference in zip(self.microbatches[step], self.reference[step], strict=True):
            with self.autocast():
                loss = self.trl.loss(rows, reference) * (len(rows) / self.batch_rows)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trl.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(torch.stack(losses).sum())


def draw_steps(setting: Setting, work: Work) -> list[list[TokenizedPair]]:
    """The rows of every step, the same for each way to train."""
    vocab_size = setting.models[work.model].vocab_size
    rows = draw_rows(setting, vocab_size, (WARM_UP + setting.repeats) * setting.batch_rows, work.shape)
    return cut(rows, setting.batch_rows)


def cut(rows: list[TokenizedPair], size: int) -> list[list[TokenizedPair]]:
    """Parts of so many rows."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def measure(setting: Setting, work: Work, *, microbatch_rows: int) -> dict[str, Any]:
    """Medians over steps, the first ones left out.

    Raises: torch.OutOfMemoryError: the micro-batches do not fit.
    """
    device = setting.device
    job: Job = (TrlJob if work.by_trl else PrlhfJob)(setting, work, microbatch_rows=microbatch_rows)
    config, side = job.config, setting.probe
    width, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    probes = ((side, side, side), (2 * side, width, inner), (2 * side, inner, width), (side // 4, width, vocab))
    seconds, rates, tokens_per_s, shares, losses, peak = [], [], [], [], [], 0
    for step, rows in enumerate(job.steps):
        rate = matmul_rate(probes, device=device, dtype=torch.bfloat16)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        began = time.perf_counter()
        losses.append(job.run_step(step))
        synchronize(device)
        taken = time.perf_counter() - began
        peak = max(peak, peak_bytes(device))
        if step >= WARM_UP:
            seconds.append(taken)
            rates.append(rate)
            tokens_per_s.append(sum(map(num_positions, rows)) / taken)
            shares.append(useful_flops(rows, config, lora=work.lora) / taken / rate)
    return {
        "model": work.model,
        "train": "LoRA" if work.lora else "full",
        "rows": work.shape or f"{setting.sequence_tokens} tokens",
        "by": "TRL, known reference" if work.by_trl else "prlhf",
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


def measure_what_fits(setting: Setting, work: Work) -> dict[str, Any]:
    """`measure` with the largest micro-batch that the device holds.

    Raises: torch.OutOfMemoryError: not even one row fits.
    """
    microbatch_rows = setting.microbatch_rows
    while True:
        try:
            return measure(setting, work, microbatch_rows=microbatch_rows)
        except torch.OutOfMemoryError:
            if microbatch_rows == 1:
                raise
        # Outside of the handler, whose traceback holds on to the tensors.
        microbatch_rows //= 2
        sys.stderr.write(f"{work.model}: out of memory; {microbatch_rows} rows at a time\n")
        gc.collect()
        torch.cuda.empty_cache()


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A row a job."""
    header = ["model", "trained", "rows of", "by", "rows at a time", "attention", "step s", "rows/s", "tokens/s",
              "share of the matmul rate", "matmul TFLOP/s", "peak GiB"]
    rows = [
        [
            result["model"],
            result["train"],
            result["rows"],
            result["by"],
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
        setting = Setting("cuda", real_models(), REAL_SEQUENCE_TOKENS, 16, 8, 8192, args.repeats, args.seed)
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
        if JOBS[job].by_trl and not has_trl():
            sys.stderr.write(f"{job}: left out, as TRL and PEFT are not installed\n")
            continue
        results.append(measure_what_fits(setting, JOBS[job]))
        figures = {"date": datetime.date.today().isoformat(), "setting": versions, "results": results}
        args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        about = describe_run("python -m benchmarks.gpu", **versions)
        args.out.with_suffix(".md").write_text(f"{about}\n\n{format_results(results)}\n", encoding="utf-8")
        gc.collect()
    sys.stdout.write(format_results(results) + "\n")


if __name__ == "__main__":
    main()
