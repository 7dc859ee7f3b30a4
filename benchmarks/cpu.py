"""Training steps on this machine: packed rows against padded rows, the authors' way and TRL, on the same rows.

    python -m benchmarks.cpu --repeats 5 --out benchmarks.json      # with TRL where it is installed (extra `bench`)

All ways run in one process, in random order within a repeat, so that a noisy machine disturbs them alike; what is
reported is the median over repeats of the ratio of rows/s. A step is 4 rows, both terms of P-DPO, and one fused AdamW
step. The authors' way repeats every row for the generic user, pads all 8 rows x 2 responses to one length, computes
logits at every position, and runs the reference in each step. "trl" is TRL's DPOTrainer on the repeated rows, and
"trl_pre" the same with known log-probs of the reference, as packed and padded have them. Peak memory is that of a
process for each way. "compiled" and "trl_compiled" are "packed" and "trl" with the decoder's blocks in the hands of
torch.compile, which takes a minute or two for each kind of training. The reference pass is timed apart: TRL's on the
repeated rows over prlhf's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig

from benchmarks.document import describe_run, write_section
from benchmarks.memory import memory_kib
from benchmarks.ways import (
    BATCH_ROWS,
    COMPILED_WAYS,
    NUM_USER_TOKENS,
    SHAPES,
    TRL_WAYS,
    WAYS,
    Bench,
    Step,
    draw_rows,
    make_bench,
    make_step,
    small_llama,
    time_step,
    ways_here,
)
from prlhf.data.tokenize import TokenizedPair
from prlhf.engine.reference import compute_reference_table
from prlhf.evaluation.report import make_table

ROOT = Path(__file__).resolve().parents[1]
JOBS = ((True, "fp32"), (False, "fp32"), (True, "bf16"), (False, "bf16"))  # with LoRA or in full
PROBES = ((2048, 2048, 2048), (4000, 384, 1024), (4000, 1024, 384), (800, 384, 32000))


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
    extras = {"with_trl": way in TRL_WAYS, "with_compiled": way in COMPILED_WAYS}
    bench, rng = make_bench(lora=lora, precision=precision, **extras), np.random.default_rng(0)
    for _ in range(2):
        time_step(bench, way, make_step(bench, draw_rows(shape, rng)))
    return memory_kib()["VmHWM"] / 2**20


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


def measure(
    shape: str, *, lora: bool, precision: str, repeats: int, seed: int, ways: Sequence[str]
) -> dict[str, Any]:
    """Medians over repeats; every way sees the same rows."""
    with_trl, with_compiled = (any(way in kind for way in ways) for kind in (TRL_WAYS, COMPILED_WAYS))
    passes = {"reference": False, **({"trl_reference": True} if with_trl else {})}
    bench = make_bench(lora=lora, precision=precision, with_trl=with_trl, with_compiled=with_compiled)
    rng, dtype = np.random.default_rng(seed), torch.bfloat16 if precision == "bf16" else torch.float32
    seconds: dict[str, list[float]] = {way: [] for way in (*ways, *passes)}
    shares, rates = [], []
    for repeat in range(-1 if with_compiled else 0, repeats + 1):
        rate, step = matmul_rate(dtype=dtype), make_step(bench, draw_rows(shape, rng))
        for way in rng.permutation(list(seconds)).tolist():
            taken = time_reference(bench, step, trl=passes[way]) if way in passes else time_step(bench, way, step)
            if repeat > 0:  # before, kernels are chosen and compiled
                seconds[way].append(taken)
        if repeat > 0:
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
    parser.add_argument("--ways", nargs="+", choices=ways_here(), default=ways_here(), help="besides packed")
    parser.add_argument("--probe", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--document", type=Path, help="also put the table into this Markdown file")
    args = parser.parse_args()
    ways = list(dict.fromkeys(("packed", *args.ways)))
    torch.set_num_threads(args.threads)
    if args.probe:
        way, shape, lora, precision = args.probe
        sys.stdout.write(f"{probe_memory(way, shape, lora=lora == '1', precision=precision)}\n")
        return
    results = []
    for lora, precision in JOBS:
        wanted = precision in args.precisions and ("LoRA" if lora else "full") in args.trained
        for shape in args.shapes if wanted else []:
            options = {"repeats": args.repeats, "seed": args.seed, "ways": ways}
            results.append(measure(shape, lora=lora, precision=precision, **options))
            sys.stderr.write(f"{json.dumps(results[-1])}\n")
    for result in results:  # other work does not disturb these
        job = {"lora": result["train"] == "LoRA", "precision": result["precision"], "threads": args.threads}
        result["peak_gib"] = {way: peak_memory(way, result["shape"], **job) for way in ways}
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
