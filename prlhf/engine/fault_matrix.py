"""The faults that `prlhf selftest --faults` tries, each with what must come of it."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from prlhf.engine.checkpoint import find_checkpoint
from prlhf.engine.fault_bench import Bench, run_name
from prlhf.engine.run_dir import read_status
from prlhf.engine.tiny_job import EVAL_STEP, NUM_STEPS
from prlhf.errors import NoCheckpointError

MUST_END_S = 30.0
NUM_FILES = 7  # that rank 0 writes into a checkpoint of the tiny job; the last call writes those of the tokenizer
KILL_POINTS = (
    ("reference", 0), ("step_begin", 3), ("after_backward", 3), ("before_optimizer", 3),
    *((f"checkpoint_file_{i}", 4) for i in range(NUM_FILES)),
    ("before_manifest", 4), ("before_rename", 4), ("after_rename", 4), ("eval", EVAL_STEP), ("eval", NUM_STEPS),
)
SECOND_RANK_POINTS = (  # it writes its random state into a checkpoint and leaves the rest to rank 0
    ("reference", 0), ("step_begin", 3), ("after_backward", 3), ("before_optimizer", 3), ("checkpoint_file_0", 4),
    ("eval", EVAL_STEP), ("eval", NUM_STEPS),
)
SIGNAL_POINTS = (
    ("reference", 0), ("step_begin", 3), ("checkpoint_file_2", 4), ("before_rename", 4), ("eval", EVAL_STEP),
    ("eval", NUM_STEPS),
)
PART_POINTS = (  # of shards: each rank writes its random state, then its part of the weights and of the moments
    ("checkpoint_file_1", 0), ("checkpoint_file_3", 0), ("checkpoint_file_1", 1), ("checkpoint_file_2", 1),
    ("before_manifest", 0), ("after_rename", 0),
)
SHARDED = ("train.parallel=fsdp",)
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "0 bytes": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "minus one byte": lambda data: data[:-1],
    "one flipped bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


class Row(NamedTuple):
    """A fault, where it happens, what must come of it, and what is wrong when it is tried."""

    fault: str
    point: str
    expected: str
    problems: Callable[[Bench], list[str]]
    is_quick: bool = False


def fault_rows() -> list[Row]:
    """Every row; the quick ones are a selection across all kinds."""
    return [*_kills(), *_errors(), *_signals(), *_damages(), *_ranks(), *_parts(), *_refusals()]


def _kills() -> list[Row]:
    same = "ends at once; resume has the same weights"
    return [
        Row("kill -9", f"{point}, step {step}", same, partial(_disturbed, f"{point}:{step}:0:kill9", 1),
            point in ("checkpoint_file_2", "after_rename"))
        for point, step in KILL_POINTS
    ]


def _errors() -> list[Row]:
    full, one_line = "ENOSPC", "exit 2, one line with path, free and needed; resume has the same weights"
    return [
        Row("an error nobody expects", "step_begin, step 3", "exit 1; resume has the same weights",
            partial(_disturbed, "step_begin:3:0:raise", 1)),
        Row(full, "checkpoint_file_1, step 4", one_line, partial(_full_disk, "checkpoint_file_1:4:0:enospc"), True),
        Row(full, "before_manifest, step 4", one_line, partial(_full_disk, "before_manifest:4:0:enospc")),
        Row("files above 20 kB fail", "first checkpoint", one_line, _file_limit),
        Row("unwritable folder", "runs is a file", "exit 2, one line", _unwritable),
        Row("read-only folder", "start", "exit 2, one line with its path", _read_only_start),
        Row("read-only run directory", "resume", "exit 2, one line; checkpoints kept; resume has the same weights",
            _read_only_resume, True),
        Row("NaN gradient", "after_backward, step 3", "step skipped and counted; exit 0", partial(_nan, 1), True),
        Row("NaN gradient, limit 1", "after_backward, step 3", "exit 2, one line", _too_many_nans),
        Row("train.lr 1e30", "every step", "exit 2, one line that names it", partial(_absurd_rate, "1e30")),
        Row("train.lr 1e200", "every step", "exit 2, one line that names it", partial(_absurd_rate, "1e200")),
    ]


def _signals() -> list[Row]:
    saved = "exit 75, preempted; resume has the same weights"
    return [
        Row(f"{name} twice", f"{point}, step {step}", saved,
            partial(_stopped, f"{point}:{step}:0:{name.lower()}"), (name, step) == ("SIGTERM", NUM_STEPS))
        for name in ("SIGTERM", "SIGINT")
        for point, step in SIGNAL_POINTS
    ]


def _damages() -> list[Row]:
    found = "found in each file before loading; resume from the one before has the same weights"
    kinds = [*DAMAGES, "deleted", "from another step"]
    return [
        *(Row(kind, "each file of a checkpoint", found, partial(_damaged, kind), kind == "one flipped bit")
          for kind in kinds),
        Row("every checkpoint damaged", "two of two", "exit 3", _all_damaged, True),
    ]


def _ranks() -> list[Row]:
    named = f"all end with its name in < {MUST_END_S:.0f} s; resume has the same weights"
    kills = [(point, step, 0) for point, step in KILL_POINTS] + [(point, step, 1) for point, step in SECOND_RANK_POINTS]
    return [
        *(Row(f"kill -9 of rank {rank} of 2", f"{point}, step {step}", named,
              partial(_lost_rank, f"{point}:{step}:{rank}:kill9", rank)) for point, step, rank in kills),
        *(Row(f"rank {rank} of 2 hangs", f"{point}, step {step}", named,
              partial(_lost_rank, f"{point}:{step}:{rank}:hang", rank))
          for point, step, rank in (("after_backward", 3, 1), ("step_begin", 3, 0), ("eval", EVAL_STEP, 1))),
        Row("the only rank hangs", "step_begin, step 3", named, partial(_disturbed, "step_begin:3:0:hang", 1)),
        Row("kill -9 of rank 1 of 2, --max-restarts 1", "step_begin, step 5", "exit 0, the same weights, 10 of 10",
            partial(_relaunched, 10)),
        Row("NaN gradient on rank 1 of 2", "after_backward, step 3", "step skipped and counted; exit 0",
            partial(_nan, 2)),
        *(Row(f"SIGTERM to rank {rank} of 2 alone", f"{point}, step {step}",
              "exit 75, preempted; resume has the same weights",
              partial(_stopped, f"{point}:{step}:{rank}:sigterm", num_ranks=2))
          for point, step, rank in (("step_begin", 3, 1), ("eval", EVAL_STEP, 1), ("reference", 0, 1))),
        Row("SIGTERM to the launcher of 2", "some time", "exit 75; resume has the same weights", _stopped_launcher),
        Row("2 ranks, then 1", "step_begin, step 5", "the same losses to 1e-4", partial(_other_world, 2, 1, ())),
        Row("1 rank, then 2", "step_begin, step 5", "the same losses to 1e-4", partial(_other_world, 1, 2, ())),
    ]


def _parts() -> list[Row]:
    named = f"all end with its name in < {MUST_END_S:.0f} s; resume has the same weights"
    found = "found in each file before loading; resume from the one before has the same weights"
    return [
        *(Row(f"kill -9 of rank {rank} of 2, sharded", f"{point}, step 4", named,
              partial(_lost_rank, f"{point}:4:{rank}:kill9", rank, settings=SHARDED)) for point, rank in PART_POINTS),
        Row("ENOSPC of rank 1 of 2, sharded", "checkpoint_file_2, step 4",
            "exit 2; resume has the same weights", _full_disk_of_a_part),
        *(Row(f"{kind}, sharded", "each file of a checkpoint", found, partial(_damaged, kind, num_ranks=2))
          for kind in ("one flipped bit", "deleted")),
        Row("2 sharded ranks, then 1", "step_begin, step 5", "the same losses to 1e-4",
            partial(_other_world, 2, 1, SHARDED)),
        Row("2 sharded ranks, then 2 of ddp", "step_begin, step 5", "the same losses to 1e-4",
            partial(_other_world, 2, 2, SHARDED)),
    ]


def _refusals() -> list[Row]:
    return [
        Row("another learning rate", "resume", "exit 2, names train.lr", _changed_setting),
        Row("another base model", "resume", "exit 2, says so", _changed_base),
        Row("two processes", "one run directory", "the second exits 2 and names the first", _two_processes, True),
        Row("batch_rows 3 for 2 ranks", "start", "exit 2, names train.batch_rows", _uneven_batch),
        Row("malformed PRLHF_FAULT", "start", "exit 2, one line", _malformed),
    ]


def _check(code: int, expected: int) -> list[str]:
    return [] if code == expected else [f"exit {code}"]


def _disturbed(fault: str, code: int, bench: Bench, num_ranks: int = 1) -> list[str]:
    name = f"{num_ranks}-{fault.replace(':', '-')}"
    outcome = bench.train(name, fault=fault, num_ranks=num_ranks)
    problems = [*_check(outcome.code, code), *bench.differences(name, num_ranks)]
    if outcome.seconds > MUST_END_S:
        problems.append(f"after {outcome.seconds:.0f} s")
    return problems


def _full_disk(fault: str, bench: Bench) -> list[str]:
    name = fault.replace(":", "-")
    outcome = bench.train(name, fault=fault)
    kept = [path.name for path in bench.checkpoints(name)]
    return [
        *_check(outcome.code, 2),
        *_one_line(outcome.errors, str(bench.runs / name), "MiB free", "MiB needed"),
        *([] if kept == ["step-00000002", "step-00000003"] else [f"kept {kept}"]),
        *bench.differences(name),
    ]


def _one_line(errors: list[str], *parts: str) -> list[str]:
    if len(errors) != 1:
        return [f"{len(errors)} error lines"]
    return [f"no {part!r} in {errors[0]!r}" for part in parts if part not in errors[0]]


def _file_limit(bench: Bench) -> list[str]:
    outcome = bench.train("limit", "model.lora=null", file_limit=20_000)
    return [*_check(outcome.code, 2), *_one_line(outcome.errors, "limit", "MiB free", "MiB needed")]


def _unwritable(bench: Bench) -> list[str]:
    (bench.folder / "file").write_text("")
    outcome = bench.train("unwritable", "--runs", str(bench.folder / "file"))
    return [*_check(outcome.code, 2), *_one_line(outcome.errors, str(bench.folder / "file"))]


def _read_only_start(bench: Bench) -> list[str]:
    folder = bench.folder / "read-only"
    folder.mkdir(mode=0o555)
    outcome = bench.train("read-only", "--runs", str(folder), obeys_permissions=True)
    return [*_check(outcome.code, 2), *_one_line(outcome.errors, str(folder), "Permission denied")]


def _read_only_resume(bench: Bench) -> list[str]:
    run_dir = _interrupted(bench, "read-only-run")
    folders = [run_dir, *(path for path in run_dir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    outcome = bench.train(run_dir.name, obeys_permissions=True)
    for folder in folders:
        folder.chmod(0o755)
    kept = [path.name for path in bench.checkpoints(run_dir.name)]
    return [
        *_check(outcome.code, 2),
        *_one_line(outcome.errors, str(run_dir), "Permission denied"),
        *([] if kept == ["step-00000003", "step-00000004"] else [f"kept {kept}"]),
        *bench.differences(run_dir.name),
    ]


def _nan(num_ranks: int, bench: Bench) -> list[str]:
    name = f"nan-{num_ranks}"
    outcome = bench.train(name, fault=f"after_backward:3:{num_ranks - 1}:nan", num_ranks=num_ranks)
    skipped = [line["step"] for line in bench.metrics(name) if line["skipped"]]
    return [*_check(outcome.code, 0), *([] if skipped == [3] else [f"skipped {skipped}"])]


def _too_many_nans(bench: Bench) -> list[str]:
    outcome = bench.train("nans", "train.max_skipped_steps=1", fault="after_backward:3:0:nan")
    return [*_check(outcome.code, 2), *_one_line(outcome.errors, "1 steps in a row")]


def _absurd_rate(rate: str, bench: Bench) -> list[str]:
    name = f"rate-{rate}"
    outcome = bench.train(name, f"train.lr={rate}", f"train.user_lr={rate}", "train.max_skipped_steps=2")
    return [*_check(outcome.code, 2), *_one_line(outcome.errors, "train.lr")]


def _stopped(fault: str, bench: Bench, num_ranks: int = 1) -> list[str]:
    name = f"{num_ranks}-{fault.replace(':', '-')}"
    outcome = bench.train(name, fault=fault, num_ranks=num_ranks)
    status = read_status(bench.runs / name).get("status", "preempted")  # before the first step nothing is begun
    problems = [*_check(outcome.code, 75), *([] if status == "preempted" else [f"status {status}"])]
    return [*problems, *bench.differences(name, num_ranks)]


def _full_disk_of_a_part(bench: Bench) -> list[str]:
    outcome = bench.train("full-part", *SHARDED, fault="checkpoint_file_2:4:1:enospc", num_ranks=2)
    kept = [path.name for path in bench.checkpoints("full-part")]
    return [
        *_check(outcome.code, 2),
        *([] if kept == ["step-00000002", "step-00000003"] else [f"kept {kept}"]),
        *bench.differences("full-part", 2, SHARDED),
    ]


def _interrupted(bench: Bench, name: str, num_ranks: int = 1) -> Path:
    """A run with checkpoints of steps 3, which was evaluated, and 4; of several ranks in parts."""
    source = f"interrupted-{num_ranks}"
    if not bench.checkpoints(source):
        settings = SHARDED if num_ranks > 1 else ()
        bench.train(source, *settings, num_ranks=num_ranks, fault="step_begin:5:0:kill9")
    shutil.copytree(bench.runs / source, bench.runs / name)
    return bench.runs / name


def _damaged(kind: str, bench: Bench, num_ranks: int = 1) -> list[str]:
    run_dir = _interrupted(bench, run_name("damage", kind, num_ranks), num_ranks)
    previous, newest = bench.checkpoints(run_dir.name)
    problems = []
    for path in sorted(newest.iterdir()):
        data, other = path.read_bytes(), (previous / path.name).read_bytes()
        if kind == "from another step" and data == other:
            continue  # a tokenizer is that of every step
        path.unlink()
        if kind != "deleted":
            path.write_bytes(other if kind == "from another step" else DAMAGES[kind](data))
        if find_checkpoint(run_dir) != previous:
            problems.append(f"{path.name}: not found")
        if path.name != "users.safetensors":
            path.write_bytes(data)
    return [*problems, *bench.differences(run_dir.name, num_ranks, SHARDED if num_ranks > 1 else ())]


def _all_damaged(bench: Bench) -> list[str]:
    run_dir = _interrupted(bench, "all-damaged")
    for directory in bench.checkpoints(run_dir.name):
        (directory / "state.json").write_bytes(b"")
    outcome = bench.train(run_dir.name)
    return [*_check(outcome.code, NoCheckpointError.exit_code), *_one_line(outcome.errors, "none of 2")]


def _lost_rank(fault: str, rank: int, bench: Bench, settings: Sequence[str] = ()) -> list[str]:
    name = run_name(2, fault, *settings)
    outcome = bench.train(name, *settings, fault=fault, num_ranks=2)
    blamed = [line for line in outcome.errors if line.startswith(f"error: rank {rank} (process")]
    problems = [*_check(outcome.code, 1), *([] if blamed else [f"not named: {outcome.errors}"])]
    if outcome.seconds > MUST_END_S:
        problems.append(f"after {outcome.seconds:.0f} s")
    if "hang" in fault and "most recent call first" not in outcome.text:
        problems.append("no stacks")
    return [*problems, *bench.differences(name, 2, settings)]


def _relaunched(times: int, bench: Bench) -> list[str]:
    problems = []
    for number in range(times):
        name = f"relaunched-{number}"
        outcome = bench.train(name, fault="step_begin:5:1:kill9", num_ranks=2, max_restarts=1)
        problems += [f"{name}: {problem}" for problem in _check(outcome.code, 0)]
        if not problems and bench.weights(name) != bench.whole(2):
            problems.append(f"{name}: other weights")
    return problems


def _stopped_launcher(bench: Bench) -> list[str]:
    launcher = bench.train_apart("launcher", num_ranks=2)
    deadline = time.monotonic() + MUST_END_S
    while not (bench.runs / "launcher" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(2):
        launcher.send_signal(signal.SIGTERM)
    return [*_check(launcher.wait(), 75), *bench.differences("launcher", 2)]


def _other_world(before: int, after: int, settings: Sequence[str], bench: Bench) -> list[str]:
    """Settings are those of the ranks before."""
    no_dropout, name = "model.lora.dropout=0.0", run_name("world", before, after, *settings)
    bench.train("no-dropout", no_dropout)
    bench.train(name, no_dropout, *settings, num_ranks=before, fault="step_begin:5:0:kill9")
    outcome = bench.train(name, no_dropout, num_ranks=after)
    losses, expected = ([line["loss"] for line in bench.metrics(run)] for run in (name, "no-dropout"))
    gap = max(abs(loss - other) for loss, other in zip(losses, expected, strict=True))
    return [*_check(outcome.code, 0), *([] if gap < 1e-4 else [f"losses differ by {gap:.1e}"])]


def _changed_setting(bench: Bench) -> list[str]:
    name = _interrupted(bench, "changed-setting").name
    outcome = bench.train(name, "train.lr=0.5")
    return [*_check(outcome.code, 2), *_one_line(outcome.errors, "train.lr")]


def _changed_base(bench: Bench) -> list[str]:
    name = _interrupted(bench, "changed-base").name
    weights = bench.folder / "model" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(DAMAGES["one flipped bit"](data))
    outcome = bench.train(name)
    weights.write_bytes(data)
    return [*_check(outcome.code, 2), *_one_line(outcome.errors, "base model")]


def _two_processes(bench: Bench) -> list[str]:
    first = bench.train_apart("two", fault="step_begin:3:0:hang")
    deadline = time.monotonic() + MUST_END_S
    while read_status(bench.runs / "two").get("status") != "running" and time.monotonic() < deadline:
        time.sleep(0.01)
    second = bench.train("two")
    first.wait()
    return [*_check(second.code, 2), *_one_line(second.errors, "in use by process")]


def _uneven_batch(bench: Bench) -> list[str]:
    outcome = bench.train("uneven", "train.batch_rows=3", num_ranks=2)
    return [*_check(outcome.code, 2), *_one_line(outcome.errors, "train.batch_rows")]


def _malformed(bench: Bench) -> list[str]:
    outcome = bench.train("malformed", fault="nowhere:1:0:kill9")
    return [*_check(outcome.code, 2), *_one_line(outcome.errors, "PRLHF_FAULT", "nowhere")]
