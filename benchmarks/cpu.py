"""Training steps on this machine: packed rows against padded rows, the authors' way and TRL, on the same rows.

    python -m benchmarks.cpu --repeats 5 --out benchmarks.json      # with TRL where it is installed (extra `bench`)

All ways run in one process, in random order within a repeat, so that a noisy machine disturbs them alike; what is
reported is the median over repeats of the ratio of rows/s. A step is 4 rows, both terms of P-DPO, and one fused AdamW
step. The authors' way repeats every row for the generic user, pads all 8 rows x 2 responses to one length, computes
logits at every position, and runs the reference in each step. "trl" is TRL's DPOTrainer on the repeated rows, and
"trl_pre" the same with known log-probs of the reference, as packed and padded have them. Peak memory is that of a
process for each way. The reference pass is timed apart: TRL's on the repeated rows over prlhf's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.document import describe_run, write_section
from benchmarks.trl_way import TrlSteps
from prlhf.data.collate import PairBatch, collate_pairs
from prlhf.data.records import UserIndex
from prlhf.data.tokenize import TokenizedPair
from prlhf.engine.build import make_autocast
from prlhf.engine.objective import Objective, ReferenceLogps
from prlhf.engine.reference import LiveReference, compute_reference_table
from prlhf.evaluation.report import make_table
from prlhf.losses import pdpo_loss, response_logps
from prlhf.models.lora import add_lora_
from prlhf.models.packing import Packing, set_up_packing_
from prlhf.models.policy import PersonalizedPolicy, Reference
from prlhf.usermodel import IndividualUserModel

ROOT = Path(__file__).resolve().parents[1]
# Mean tokens of prompt, chosen and rejected response; lengths are log-normal.
SHAPES = {"tldr": (348, 35, 35), "psoups": (61, 198, 198), "prism": (245, 142, 143)}
SPREAD = 0.35
BATCH_ROWS = 4
NUM_USERS = 16
NUM_USER_TOKENS = 10
BETA, ALPHA = 0.1, 0.5
JOBS = ((True, "fp32"), (False, "fp32"), (True, "bf16"), (False, "bf16"))  # with LoRA or in full
PROBES = ((2048, 2048, 2048), (4000, 384, 1024), (4000, 1024, 384), (800, 384, 32000))


@dataclass
class Bench:
    """A policy in training, and the same one in TRL's hands."""

    policy: PersonalizedPolicy
    packing: Packing
    trl: TrlSteps | None
    optimizers: list[torch.optim.Optimizer]
    autocast: Callable[[], AbstractContextManager[object]]

    def update(self) -> None:
        """One step with whatever gradients there are."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def small_llama() -> LlamaConfig:
    """A Llama of 26.4 M parameters."""
    return LlamaConfig(
        hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=6, intermediate_size=1024,
        vocab_size=32000, tie_word_embeddings=True, max_position_embeddings=2048,
    )


def make_policy(
    config: LlamaConfig, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PersonalizedPolicy:
    """Random weights, made on the device, and users; every tensor is trained."""
    torch.manual_seed(0)
    with torch.device(device):
        backbone = AutoModelForCausalLM.from_config(config, dtype=dtype)
    packing = set_up_packing_(backbone)
    assert isinstance(packing, Packing), packing
    dim = config.hidden_size
    encoder = IndividualUserModel(num_users=NUM_USERS, num_user_tokens=NUM_USER_TOKENS, dim=dim)
    encoder.init_(0.02 * torch.randn(NUM_USER_TOKENS, dim))
    users = UserIndex([f"u{i}" for i in range(NUM_USERS)])
    policy = PersonalizedPolicy(backbone, SimpleNamespace(bos_token_id=1), user_encoder=encoder, users=users)
    policy.packing = packing
    return policy.to(device)


def make_bench(*, lora: bool, precision: str = "fp32", with_trl: bool = False) -> Bench:
    """The small model, trained in full or with LoRA; weights are float32, matmuls of the precision."""
    policy = make_policy(small_llama())
    assert policy.packing is not None
    trl = TrlSteps(policy.backbone, lora=lora, beta=BETA, num_user_tokens=NUM_USER_TOKENS) if with_trl else None
    if lora:
        add_lora_(policy.backbone, rank=8, alpha=16.0, dropout=0.0, targets="auto")
    policy.reference = Reference(policy, frozen_copy=not lora)
    trained = [list(policy.trainable().values()), *([trl.parameters()] if trl else [])]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(each, lr=1e-5, fused=True) for each in trained]
    return Bench(policy, policy.packing, trl, optimizers, make_autocast(precision, torch.device("cpu")))


def draw_rows(shape: str, rng: np.random.Generator) -> list[TokenizedPair]:
    """One step's rows."""

    def tokens(mean: int) -> tuple[int, ...]:
        length = max(2, round(rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD)))
        return tuple(rng.integers(3, 32000, length).tolist())

    prompt, chosen, rejected = SHAPES[shape]
    return [
        TokenizedPair(row, int(rng.integers(1, NUM_USERS + 1)), (1, *tokens(prompt)), tokens(chosen), tokens(rejected))
        for row in range(BATCH_ROWS)
    ]


@dataclass(frozen=True)
class Step:
    """One step's rows, collated, and what is known of them beforehand."""

    rows: list[TokenizedPair]
    batch: PairBatch
    reference: ReferenceLogps


def make_step(bench: Bench, rows: list[TokenizedPair]) -> Step:
    """The step of these rows."""
    batch = collate_pairs(rows, pad_id=0)
    with bench.autocast():
        return Step(rows, batch, LiveReference(bench.policy.reference)(batch))


def prlhf_losses(bench: Bench, step: Step, *, packed: bool) -> Tensor:
    """P-DPO as prlhf computes it."""
    bench.policy.packing = bench.packing if packed else None
    return Objective("pdpo", beta=BETA, alpha=ALPHA)(bench.policy, step.batch, step.reference).losses


def authors_losses(bench: Bench, step: Step) -> Tensor:
    """P-DPO as the authors' code computes it."""
    policy, batch = bench.policy, step.batch
    user_ids = torch.cat([batch.user_ids, torch.zeros_like(batch.user_ids)])
    chosen, rejected = batch.input_ids.chunk(2)
    chosen_labels, rejected_labels = batch.labels.chunk(2)
    ids = torch.cat([chosen, chosen, rejected, rejected])
    labels = torch.cat([chosen_labels, chosen_labels, rejected_labels, rejected_labels])

    def logps(model: torch.nn.Module, users: Tensor | None) -> Tensor:
        embeds = policy.input_embeds(ids, users, None, None if users is None else torch.arange(len(users)).repeat(2))
        num_soft = embeds.shape[1] - ids.shape[1]
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
        return response_logps(logits, F.pad(labels, (num_soft, 0), value=-100))

    with policy.reference.active() as frozen:
        reference = logps(frozen.backbone, None).chunk(4)
    individual_chosen, generic_chosen, individual_rejected, generic_rejected = logps(
        policy.backbone, user_ids
    ).chunk(4)
    return pdpo_loss(
        individual_chosen,
        individual_rejected,
        generic_chosen,
        generic_rejected,
        reference[0],
        reference[2],
        alpha=ALPHA,
        beta=BETA,
    ).losses


def trl_losses(bench: Bench, step: Step, *, precomputed: bool) -> Tensor:
    """The mean that TRL trains."""
    assert bench.trl is not None
    return bench.trl.loss(step.rows, step.reference if precomputed else None)


WAYS: dict[str, Callable[[Bench, Step], Tensor]] = {
    "packed": partial(prlhf_losses, packed=True),
    "padded": partial(prlhf_losses, packed=False),
    "authors": authors_losses,
    "trl": partial(trl_losses, precomputed=False),
    "trl_pre": partial(trl_losses, precomputed=True),
}
TRL_WAYS = ("trl", "trl_pre")


def ways_here() -> list[str]:
    """Those that can be run: TRL's where it is installed."""
    has_trl = all(importlib.util.find_spec(name) for name in ("trl", "peft"))
    return [way for way in WAYS if has_trl or way not in TRL_WAYS]


def time_step(bench: Bench, way: str, step: Step) -> float:
    """Seconds of one optimizer step."""
    began = time.perf_counter()
    with bench.autocast():
        loss = WAYS[way](bench, step).mean()
    loss.backward()
    bench.update()
    return time.perf_counter() - began


def time_reference(bench: Bench, step: Step, *, trl: bool) -> float:
    """Seconds of the reference's log-probs of a step's rows, before training; TRL has every row twice."""
    bench.policy.packing = bench.packing
    began = time.perf_counter()
    if trl:
        assert bench.trl is not None
        with bench.autocast():
            bench.trl.reference_logps(step.rows)
    else:
        compute_reference_table(
            bench.policy.reference, step.rows, pad_id=0, microbatch_tokens=4096, autocast=bench.autocast
        )
    return time.perf_counter() - began


def peak_memory(way: str, shape: str, *, lora: bool, precision: str, threads: int) -> float:
    """GiB that a process of its own takes at most over two steps of a way."""
    probe = [way, shape, str(int(lora)), precision]
    command = [sys.executable, "-m", "benchmarks.cpu", "--probe", *probe, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def probe_memory(way: str, shape: str, *, lora: bool, precision: str) -> float:
    """GiB of this process after two steps of a way: the second has the optimizer's moments beside it."""
    bench, rng = make_bench(lora=lora, precision=precision, with_trl=way in TRL_WAYS), np.random.default_rng(0)
    for _ in range(2):
        time_step(bench, way, make_step(bench, draw_rows(shape, rng)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def useful_flops(rows: Sequence[TokenizedPair], config: LlamaConfig, *, lora: bool) -> float:
    """Matmul FLOPs that a step needs: two trees a row; with LoRA frozen weights get no gradient."""
    width, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    linear = layers * width * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    total = 0.0
    for row in rows:
        prompt = len(row.prompt_ids) + NUM_USER_TOKENS
        chosen, rejected = len(row.chosen_ids), len(row.rejected_ids)
        pairs = prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in (chosen, rejected))
        dense = 2 * (prompt + chosen + rejected) * linear + 2 * width * vocab * (chosen + rejected)
        total += 2 * ((2 if lora else 3) * dense + 3 * 4 * queries * layers * pairs)
    return total


def synchronize(device: str) -> None:
    """Wait for what the device was given to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(
    probes: Sequence[tuple[int, int, int]] = PROBES, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> float:
    """FLOP/s of matmuls on this machine now: the median over shapes (m, k, n), three tries each."""
    rates = []
    for m, k, n in probes:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        if device == "cuda":
            a @ b  # the first call chooses a kernel
        for _ in range(3):
            synchronize(device)
            began = time.perf_counter()
            a @ b
            synchronize(device)
            rates.append(2 * m * k * n / (time.perf_counter() - began))
    return statistics.median(rates)


def measure(shape: str, *, lora: bool, precision: str, repeats: int, seed: int) -> dict[str, Any]:
    """Medians over repeats; every way sees the same rows."""
    ways = ways_here()
    passes = {"reference": False, **({"trl_reference": True} if "trl" in ways else {})}
    bench = make_bench(lora=lora, precision=precision, with_trl="trl" in ways)
    rng, dtype = np.random.default_rng(seed), torch.bfloat16 if precision == "bf16" else torch.float32
    seconds: dict[str, list[float]] = {way: [] for way in (*ways, *passes)}
    shares, rates = [], []
    for repeat in range(repeats + 1):
        rate, step = matmul_rate(dtype=dtype), make_step(bench, draw_rows(shape, rng))
        for way in rng.permutation(list(seconds)).tolist():
            taken = time_reference(bench, step, trl=passes[way]) if way in passes else time_step(bench, way, step)
            if repeat:  # the first one warms up
                seconds[way].append(taken)
        if repeat:
            rates.append(rate)
            shares.append(useful_flops(step.rows, small_llama(), lora=lora) / seconds["packed"][-1] / rate)

    def ratio(way: str, own: str) -> float:
        return statistics.median(theirs / ours for theirs, ours in zip(seconds[way], seconds[own], strict=True))

    return {
        "shape": shape,
        "train": "LoRA" if lora else "full",
        "precision": precision,
        "rows_per_s": {way: BATCH_ROWS / statistics.median(values) for way, values in seconds.items()},
        "packed_over": {way: ratio(way, "packed") for way in ways if way != "packed"},
        "reference_over": {way: ratio(way, "reference") for way in passes if way != "reference"},
        "share_of_matmul_rate": statistics.median(shares),
        "matmul_gflop_per_s": statistics.median(rates) / 1e9,
    }


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """One row a shape and kind of training, and one for the mean ratios over its shapes."""
    others = [way for way in WAYS if way in results[0]["packed_over"]]
    passes = list(results[0]["reference_over"])
    header = ["trained", "shape", "packed, rows/s", *(f"over {way}" for way in others),
              *(["TRL's reference pass over prlhf's"] if passes else []), "share of the matmul rate", "packed, GiB",
              *(f"{way}, GiB" for way in others)]
    rows = []
    for kind in dict.fromkeys((result["train"], result["precision"]) for result in results):
        own = [result for result in results if (result["train"], result["precision"]) == kind]
        rows += [
            [
                " ".join(kind),
                result["shape"],
                f"{result['rows_per_s']['packed']:.2f}",
                *(f"{result['packed_over'][way]:.2f}" for way in others),
                *(f"{result['reference_over'][way]:.2f}" for way in passes),
                f"{result['share_of_matmul_rate']:.2f}",
                *(f"{result['peak_gib'][way]:.2f}" for way in ("packed", *others)),
            ]
            for result in own
        ]
        means = [("packed_over", way) for way in others] + [("reference_over", way) for way in passes]
        mean = [f"{statistics.mean(result[key][way] for result in own):.2f}" for key, way in means]
        rows.append([" ".join(kind), "mean", "", *mean, *[""] * (2 + len(others))])
    return make_table(header, rows)


def main() -> None:
    """Measure every shape with LoRA and in full, in both precisions; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--trained", nargs="+", choices=("LoRA", "full"), default=["LoRA", "full"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--probe", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--document", type=Path, help="also put the table into this Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        way, shape, lora, precision = args.probe
        sys.stdout.write(f"{probe_memory(way, shape, lora=lora == '1', precision=precision)}\n")
        return
    results = []
    for lora, precision in JOBS:
        wanted = precision in args.precisions and ("LoRA" if lora else "full") in args.trained
        for shape in args.shapes if wanted else []:
            results.append(measure(shape, lora=lora, precision=precision, repeats=args.repeats, seed=args.seed))
            sys.stderr.write(f"{json.dumps(results[-1])}\n")
    for result in results:  # other work does not disturb these
        job = {"lora": result["train"] == "LoRA", "precision": result["precision"], "threads": args.threads}
        result["peak_gib"] = {way: peak_memory(way, result["shape"], **job) for way in ways_here()}
    setting = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": args.threads,
        "repeats": args.repeats,
        "seed": args.seed,
    }
    if args.out:
        args.out.write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n", encoding="utf-8")
    table = format_results(results)
    sys.stdout.write(table + "\n")
    if args.document:
        about = describe_run("python -m benchmarks.cpu", **setting)
        write_section(args.document, "training steps", f"{about}\n\n{table}")


if __name__ == "__main__":
    main()
