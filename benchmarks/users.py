"""Users from a thousand to ten million: what a training step costs, and the store's opening, reading, appending.

    python -m benchmarks.users --directory /tmp/users_bench --out users.json

A step is the users' part alone, forward to optimizer, of 16 rows of random users; memory is that after 200 steps,
without the pages of the tables' files, which the system may take back, and with them. Whole steps are P-DPO steps of
`builtin:tiny` with LoRA on four rows of the shape psoups, and memory is that of their process, users' ids included.

Low-rank users have 16 numbers, individual ones a soft prompt of 10 x 384. Ids are 32 random hexadecimal digits, so an
append changes pages all over the index. Each size is written by one process and read by another, each with peak memory
of its own, torch's import included; before it is read, its files leave the system's page cache, so that the cold reads
come from the disk. The directory is deleted after each size. Where other programs keep the cores busy, times also say
what they are without the time that the process was ready and waited for a core (Linux's schedstat).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.document import describe_run, write_section
from benchmarks.memory import memory_kib
from benchmarks.ways import ALPHA, BATCH_ROWS, BETA, NUM_USER_TOKENS, draw_rows
from prlhf.data.collate import collate_pairs
from prlhf.data.user_index import UserIndex
from prlhf.engine.build import make_autocast
from prlhf.engine.objective import Objective
from prlhf.engine.optim import all_reduce_gradients_, clip_gradients_, make_optimizer
from prlhf.engine.reference import LiveReference
from prlhf.engine.step import train_step_
from prlhf.evaluation.report import make_table
from prlhf.models.backbone import BUILTIN_TINY, embedding_dim, load_backbone
from prlhf.models.lora import add_lora_
from prlhf.models.packing import Packing, set_up_packing_
from prlhf.models.policy import PersonalizedPolicy
from prlhf.usermodel import IndividualUserModel, LowRankUserModel, UserModel
from prlhf.usermodel.store import RowField, UserStore

KINDS = {
    "low-rank, float32": RowField((16,), torch.float32),
    "low-rank, bfloat16": RowField((16,), torch.bfloat16),
    "individual, bfloat16": RowField((10, 384), torch.bfloat16),
}
SIZES = (
    ("low-rank, float32", 10_000),
    ("low-rank, float32", 1_000_000),
    ("low-rank, float32", 10_000_000),
    ("low-rank, bfloat16", 10_000_000),
    ("individual, bfloat16", 1_000_000),
)
ROOT = Path(__file__).resolve().parents[1]
NUM_READS = 2000
TABLES = (
    ("individual", 1_000),
    ("individual", 10_000),
    ("individual", 1_000_000),
    ("low-rank", 1_000),
    ("low-rank", 1_000_000),
    ("low-rank", 10_000_000),
)
NUM_STEPS, NUM_WHOLE_STEPS = 200, 20
WHOLE = (("individual", 1_000), ("individual", 1_000_000), ("low-rank", 1_000), ("low-rank", 10_000_000))


def user_id(index: int) -> str:
    """The id of the index-th user of the benchmark."""
    return hashlib.md5(index.to_bytes(8, "little"), usedforsecurity=False).hexdigest()


def append_users(directory: Path, kind: str, num_users: int, batch: int) -> dict[str, float]:
    """Users per second of `put`, over all, over the last tenth, and without waiting for a core; peak memory."""
    field = KINDS[kind]
    noise = torch.randn(batch, *field.shape, generator=torch.Generator().manual_seed(0)).to(field.dtype)
    seconds, waited_s = [], 0.0
    with UserStore.create(directory, {"row": field}) as store:
        for start in range(0, num_users, batch):
            users = [user_id(i) for i in range(start, min(start + batch, num_users))]
            rows = noise[: len(users)] + start / num_users
            began, waited = time.perf_counter(), waited_for_core_s()
            store.put(users, rows)
            seconds.append(time.perf_counter() - began)
            waited_s += waited_for_core_s() - waited
    late = seconds[-max(1, len(seconds) // 10) :]
    return {
        "append_per_s": num_users / sum(seconds),
        "unhindered_append_per_s": num_users / (sum(seconds) - waited_s),
        "late_append_per_s": len(late) * min(batch, num_users) / sum(late),
        "append_peak_mib": peak_mib(),
    }


def read_users(directory: Path, kind: str, num_users: int, batch: int) -> dict[str, float]:
    """Opening and reads of one random user at a time, from the disk and once more from the page cache."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    began, waited = time.perf_counter(), waited_for_core_s()
    store = UserStore.open(directory)
    open_s = time.perf_counter() - began
    figures = {"open_ms": 1e3 * open_s, "unhindered_open_ms": 1e3 * (open_s - waited_for_core_s() + waited)}
    users = [user_id(i) for i in random.Random(0).sample(range(num_users), min(NUM_READS, num_users))]
    for state in ("cold", "warm"):
        seconds = [_time_read(store, user) for user in users]
        figures[f"{state}_read_ms"] = 1e3 * statistics.median(seconds)
        figures[f"{state}_read_p99_ms"] = 1e3 * statistics.quantiles(seconds, n=100)[-1]
    store.close()
    return {**figures, "read_peak_mib": peak_mib()}


def make_user_model(kind: str, num_users: int, *, dim: int) -> tuple[UserModel, torch.Generator]:
    """A user model with random soft prompts, and the generator that they came from."""
    sizes = {"num_users": num_users, "num_user_tokens": NUM_USER_TOKENS, "dim": dim}
    model = IndividualUserModel(**sizes) if kind == "individual" else LowRankUserModel(rank=16, **sizes)
    generator = torch.Generator().manual_seed(0)
    initial = 0.02 * torch.randn(model.num_initial, NUM_USER_TOKENS, dim, generator=generator)
    model.init_(initial if model.num_initial > 1 else initial[0])
    return model, generator


def train_models(kind: str, num_users: int) -> dict[str, float]:
    """Median seconds of whole steps, the first left out, and resident memory after the last."""
    backbone, tokenizer = load_backbone(BUILTIN_TINY)
    packing = set_up_packing_(backbone)
    assert isinstance(packing, Packing)
    model, generator = make_user_model(kind, num_users, dim=embedding_dim(backbone))
    users = UserIndex([user_id(index) for index in range(num_users)])
    policy = PersonalizedPolicy(backbone, tokenizer, user_encoder=model, users=users)
    policy.packing = packing
    add_lora_(policy.backbone, rank=8, alpha=16.0, dropout=0.0, targets="auto")
    rates = {"lr": 1e-3, "user_lr": 1e-3, "cluster_lr": 1e-3, "encoder_lr": 1e-3}
    optimizer = make_optimizer(policy.trainable(), weight_decay=0.0, **rates)
    rng, seconds, unhindered = np.random.default_rng(0), [], []
    for _ in range(NUM_WHOLE_STEPS + 1):
        drawn = torch.randint(1, num_users + 1, (BATCH_ROWS,), generator=generator).tolist()
        rows = draw_rows("psoups", rng, vocab_size=len(tokenizer))
        rows = [dataclasses.replace(row, user_id=user) for row, user in zip(rows, drawn, strict=True)]
        batch = collate_pairs(rows, pad_id=0)
        reference = LiveReference(policy.reference)(batch)
        began, waited = time.perf_counter(), waited_for_core_s()
        train_step_(
            policy,
            optimizer,
            Objective("pdpo", beta=BETA, alpha=ALPHA),
            [batch],
            reference_of=lambda _, known=reference: known,
            num_global_rows=BATCH_ROWS,
            max_grad_norm=1.0,
            autocast=make_autocast("fp32", torch.device("cpu")),
        )
        seconds.append(time.perf_counter() - began)
        unhindered.append(seconds[-1] - waited_for_core_s() + waited)
    return {
        "step_s": statistics.median(seconds[1:]),
        "unhindered_step_s": statistics.median(unhindered[1:]),
        "resident_mib": memory_kib()["VmRSS"] / 1024,
        "peak_mib": peak_mib(),
    }


def train_users(kind: str, num_users: int) -> dict[str, float]:
    """Median milliseconds of a step's users' part, and resident memory after the last."""
    model, generator = make_user_model(kind, num_users, dim=384)
    parameters = {f"user_encoder.{name}": parameter for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(parameters, lr=1e-3, user_lr=1e-3, cluster_lr=1e-3, encoder_lr=1e-3, weight_decay=0.0)
    seconds, unhindered = [], []
    for _ in range(NUM_STEPS):
        user_ids = torch.randint(0, num_users + 1, (16,), generator=generator)
        began, waited = time.perf_counter(), waited_for_core_s()
        model(user_ids).square().sum().backward()
        all_reduce_gradients_(parameters.values())
        clip_gradients_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        unhindered.append(seconds[-1] - waited_for_core_s() + waited)
    kib = memory_kib()
    return {
        "step_ms": 1e3 * statistics.median(seconds),
        "unhindered_step_ms": 1e3 * statistics.median(unhindered),
        "anonymous_mib": kib["RssAnon"] / 1024,
        "resident_mib": kib["VmRSS"] / 1024,
    }


def _time_read(store: UserStore, user: str) -> float:
    began = time.perf_counter()
    store.read([user])
    return time.perf_counter() - began


def waited_for_core_s() -> float:
    """Seconds that this process was ready to run and did not."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    return memory_kib()["VmHWM"] / 1024


def run_apart(half: str, kind: str, num_users: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one process."""
    command = [sys.executable, "-m", "benchmarks.users", "--half", half, kind, str(num_users)]
    done = subprocess.run(
        [*command, "--batch", str(args.batch), "--directory", str(args.directory.resolve())],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return {"kind": kind, "num_users": num_users, **json.loads(done.stdout)}


def measure(kind: str, num_users: int, args: argparse.Namespace) -> dict[str, Any]:
    """One size, each half in a process of its own."""
    result: dict[str, Any] = {}
    try:
        for half in ("append", "read"):
            result |= run_apart(half, kind, num_users, args)
        result["disk_mib"] = sum(path.stat().st_size for path in args.directory.iterdir()) / 2**20
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)
    return result


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of the store."""
    header = [
        "users", "number", "open ms", "unhindered", "read ms: cold, p99", "warm, p99",
        "appends/s", "last tenth", "unhindered", "peak MiB: reading", "appending", "disk MiB",
    ]  # fmt: skip
    rows = [
        [
            r["kind"],
            f"{r['num_users']:,}",
            f"{r['open_ms']:.1f}",
            f"{r['unhindered_open_ms']:.1f}",
            f"{r['cold_read_ms']:.2f}, {r['cold_read_p99_ms']:.2f}",
            f"{r['warm_read_ms']:.3f}, {r['warm_read_p99_ms']:.3f}",
            f"{r['append_per_s']:,.0f}",
            f"{r['late_append_per_s']:,.0f}",
            f"{r['unhindered_append_per_s']:,.0f}",
            f"{r['read_peak_mib']:.0f}",
            f"{r['append_peak_mib']:.0f}",
            f"{r['disk_mib']:,.0f}",
        ]
        for r in results
    ]
    return make_table(header, rows)


def format_steps(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of training steps."""
    header = ["users", "number", "step ms", "unhindered", "anonymous MiB", "resident MiB"]
    keys = ("step_ms", "unhindered_step_ms", "anonymous_mib", "resident_mib")
    return make_table(header, [[r["kind"], f"{r['num_users']:,}", *(f"{r[key]:.1f}" for key in keys)] for r in results])


def format_whole(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of whole steps."""
    header = ["users", "number", "whole step s", "unhindered", "resident MiB", "peak MiB"]
    rows = [
        [
            r["kind"],
            f"{r['num_users']:,}",
            f"{r['step_s']:.3f}",
            f"{r['unhindered_step_s']:.3f}",
            f"{r['resident_mib']:.0f}",
            f"{r['peak_mib']:.0f}",
        ]
        for r in results
    ]
    return make_table(header, rows)


def main() -> None:
    """Measure every size; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("users_bench"), help="made and deleted")
    parser.add_argument("--batch", type=int, default=50_000, help="users a put; a tenth of it of individual ones")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--max-users", type=int, default=10_000_000, help="leave larger sizes out")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--document", type=Path, help="also put the tables into this Markdown file")
    parser.add_argument("--half", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.half:
        half, kind, num_users = args.half
        trainings = {"train": train_users, "whole": train_models}
        if half in trainings:
            figures = trainings[half](kind, int(num_users))
        else:
            batch = args.batch // 10 if kind.startswith("individual") else args.batch
            work = {"append": append_users, "read": read_users}[half]
            figures = work(args.directory, kind, int(num_users), batch)
        sys.stdout.write(json.dumps(figures))
        return
    steps = [run_apart("train", kind, num, args) for kind, num in TABLES if num <= args.max_users]
    sys.stdout.write(format_steps(steps) + "\n\n")
    whole = [run_apart("whole", kind, num, args) for kind, num in WHOLE if num <= args.max_users]
    sys.stdout.write(format_whole(whole) + "\n\n")
    stores = [measure(kind, num, args) for kind, num in SIZES if kind in args.kinds and num <= args.max_users]
    sys.stdout.write(format_results(stores) + "\n")
    setting = {"torch": torch.__version__, "python": platform.python_version(), "batch": args.batch}
    if args.out:
        figures = {"setting": setting, "steps": steps, "whole_steps": whole, "stores": stores}
        args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.document:
        about = describe_run("python -m benchmarks.users", **setting)
        tables = [format_steps(steps), format_whole(whole), format_results(stores)]
        write_section(args.document, "users", "\n\n".join([about, *tables]))


if __name__ == "__main__":
    main()
