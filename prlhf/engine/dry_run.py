"""What a run would do: everything resolved, loaded and tokenized, one step timed, nothing written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.config import Config, dump_config
from prlhf.distributed import world_size
from prlhf.engine.build import Job, build_job
from prlhf.engine.memory import peak_memory_bytes
from prlhf.engine.reference import LiveReference, no_reference
from prlhf.engine.selection import check_selection
from prlhf.engine.step import Batch, accumulate_gradients_
from prlhf.engine.trainer import batches_of_step
from prlhf.evaluation.report import make_table

BYTES_PER_MOMENT_PAIR = 8  # two float32 moments a trained value


def describe_job(config: Config, run_dir: Path) -> str:
    """The resolved configuration, sizes, and estimates of memory and time from one timed step without update."""
    began = time.perf_counter()
    job = build_job(config)
    check_selection(job)
    loaded_s = time.perf_counter() - began
    step_s = _time_one_step(job)
    total = sum(parameter.numel() for parameter in job.model.parameters())
    trainable = sum(parameter.numel() for parameter in job.model.trainable().values())
    weights = sum(p.numel() * p.element_size() for p in job.model.parameters())
    copies = 1 + int(job.reference is not None and job.reference.frozen_copy)
    training = trainable * (4 + BYTES_PER_MOMENT_PAIR)
    lengths = np.array([row.num_tokens for row in job.rows])
    rows = [
        ["backbone", f"{config.model.backbone}, {total:,} parameters, {trainable:,} trained"],
        [
            "users",
            f"{0 if job.model.users is None else len(job.model.users):,} known, "
            f"{job.model.soft_prompt.num_user_tokens} soft tokens each",
        ],
        ["rows", f"{len(job.rows):,} to train on; dropped: {dict(job.dropped) or 'none'}"],
        [
            "tokens a row",
            f"mean {lengths.mean():.0f}, 95% {np.percentile(lengths, 95):.0f}, max {lengths.max()} "
            f"(limit {config.data.max_tokens})",
        ],
        [
            "steps",
            f"{job.max_steps:,} of {config.train.batch_rows} rows on {world_size()} rank(s); "
            f"{len(batches_of_step(job, 0)[0])} micro-batch(es) a step and rank",
        ],
        [
            "memory",
            f"{(weights * copies + training) / 2**20:.0f} MiB for weights, gradients and moments; "
            f"{peak_memory_bytes() / 2**20:.0f} MiB resident at most in one step",
        ],
        [
            "time",
            f"about {step_s:.2f} s a step, {step_s * job.max_steps / 60:.1f} min for the training loop; "
            f"set-up {loaded_s:.1f} s",
        ],
        ["run directory", f"{run_dir} ({'exists' if run_dir.exists() else 'new'}); nothing was written"],
    ]
    return dump_config(config) + "\n" + make_table(["dry run", ""], rows) + "\n"


def _time_one_step(job: Job) -> float:
    """Seconds of one step's forward and backward on this rank, after one to warm up."""
    seconds = 0.0
    reference: Callable[[Batch], Any] = no_reference if job.reference is None else LiveReference(job.reference)
    for step in range(2):
        batches, num_rows = batches_of_step(job, step)
        began = time.perf_counter()
        accumulate_gradients_(
            job.model, job.objective, batches, reference_of=reference, num_global_rows=num_rows, autocast=job.autocast
        )
        seconds = time.perf_counter() - began
        job.optimizer.zero_grad(set_to_none=True)
    return seconds
