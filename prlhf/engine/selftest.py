"""`prlhf selftest`: a tiny job under every fault of a list, or under random ones: does it end as undisturbed?"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prlhf.engine.tiny_job import NUM_STEPS
from prlhf.errors import ConfigError, RankError

if TYPE_CHECKING:  # imports torch and transformers
    from prlhf.engine.fault_bench import Bench
    from prlhf.engine.fault_matrix import Row

MAX_FAULTS = 4  # of one run under chaos
MAX_TRIES = 20  # of a kill that shall come before the run's end
RANDOM_POINTS = (
    "step_begin", "after_backward", "before_optimizer", "checkpoint_file_0", "checkpoint_file_3", "before_manifest",
    "before_rename", "after_rename", "eval",
)
RANDOM_ACTIONS = ("kill9", "raise", "hang", "enospc", "sigterm", "sigint")  # nan leaves a trace: a step is skipped


def add_selftest_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prlhf selftest`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--faults", action="store_true", help="every fault of a list, with what must come of it")
    what.add_argument("--kills", type=int, metavar="N", help="N runs, each killed once at a random moment of its life")
    what.add_argument("--chaos", type=float, metavar="MINUTES", help="runs under several random faults each")
    parser.add_argument("--quick", action="store_true", help="with --faults: a selection that takes seconds")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="with --kills: ranks (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is random (default: 0)")


def run_selftest(args: argparse.Namespace) -> int:
    """Print what was tried and what came of it; 1 when anything ended otherwise than expected.

    Raises: ConfigError: options that do not go together.
    """
    if args.quick and not args.faults:
        raise ConfigError("selftest: --quick goes with --faults")
    if args.nproc < 1 or (args.nproc > 1 and args.kills is None):
        raise ConfigError("selftest: --nproc is 1 or more, above 1 with --kills")
    from prlhf.engine.fault_bench import Bench
    from prlhf.engine.fault_matrix import fault_rows

    logging.getLogger("prlhf").setLevel(logging.ERROR)  # what is expected here is a warning elsewhere
    with tempfile.TemporaryDirectory(prefix="prlhf-selftest-") as folder:
        bench = Bench(Path(folder))
        if args.faults:
            return report_rows(bench, [row for row in fault_rows() if row.is_quick or not args.quick])
        if args.kills is not None:
            return kill_at_random(bench, args.kills, num_ranks=args.nproc, seed=args.seed)
        return make_chaos(bench, 60 * args.chaos, seed=args.seed)


def report_rows(bench: Bench, rows: Sequence[Row]) -> int:
    """Try each row and print its line of the table."""
    failures = 0
    for row in rows:
        began = time.perf_counter()
        problems = row.problems(bench)
        failures += bool(problems)
        seen = f"FAILED: {'; '.join(problems)}" if problems else f"ok, {time.perf_counter() - began:.1f} s"
        _print(f"{row.fault:<41} {row.point:<26} {row.expected}: {seen}")
    _print(f"{len(rows) - failures} of {len(rows)} as expected")
    return 1 if failures else 0


def kill_at_random(bench: Bench, num_runs: int, *, num_ranks: int, seed: int) -> int:
    """Runs of which a rank is killed at a random moment of the run's life, and that are resumed."""
    draw, life_s = random.Random(seed), bench.whole_seconds(num_ranks)
    num_landed = num_equal = 0
    num_at: Counter[int] = Counter()  # checkpoints that a run had when it was killed -> runs
    for number in range(num_runs):
        name = f"kill-{number}"
        when, life_s = _kill(bench, name, num_ranks, draw, life_s)
        num_landed += when is not None
        num_at[len(bench.checkpoints(name))] += when is not None
        problems = bench.differences(name, num_ranks)
        num_equal += not problems
        if problems:
            _print(f"{when}: {'; '.join(problems)}")
        bench.remove(name)
    spread = ", ".join(f"{count} with {checkpoints}" for checkpoints, count in sorted(num_at.items()) if count)
    _print(f"{num_runs} runs of {num_ranks} rank(s), one killed at a random moment, seed {seed}: {num_landed} of "
           f"{num_runs} kills landed before the end (checkpoints by then: {spread or 'none'}), {num_equal} of "
           f"{num_runs} ended with the undisturbed run's weights")
    return 0 if num_landed == num_equal == num_runs else 1


def _kill(
    bench: Bench, name: str, num_ranks: int, draw: random.Random, life_s: float
) -> tuple[str | None, float]:
    """Start a run until a kill has come before its end.

    Args:
        life_s: how long such a run is thought to take; when one has ended first, that one's time is taken from then on.
    Returns: (which rank was killed and when, or None after MAX_TRIES runs that ended first; the time of a run now).
    Raises: RankError: a run failed without having been killed.
    """
    for _ in range(MAX_TRIES):
        bench.remove(name)
        rank, after_s = draw.randrange(num_ranks), draw.uniform(0, life_s)
        outcome = bench.train(name, num_ranks=num_ranks, kill=(rank, after_s))
        if outcome.killed:
            return f"rank {rank} killed after {after_s:.2f} s", life_s
        if outcome.code:
            raise RankError(f"a run that nothing killed ended with exit code {outcome.code}: {outcome.text}")
        life_s = outcome.seconds
    return None, life_s


def make_chaos(bench: Bench, seconds: float, *, seed: int) -> int:
    """Until the time is over: a run under up to MAX_FAULTS random faults, one after the other, then resumed."""
    draw, deadline = random.Random(seed), time.monotonic() + seconds
    num_runs = num_faults = num_equal = 0
    while time.monotonic() < deadline:
        name, num_ranks = f"chaos-{num_runs}", draw.choice((1, 1, 2))
        faults = []
        for _ in range(draw.randint(1, MAX_FAULTS)):
            faults.append(_disturb(bench, name, num_ranks, draw))
        problems = bench.differences(name, num_ranks)
        num_runs, num_faults, num_equal = num_runs + 1, num_faults + sum(map(bool, faults)), num_equal + (not problems)
        if problems:
            _print(f"{num_ranks} rank(s), {', '.join(faults)}: {'; '.join(problems)}")
        bench.remove(name)
    _print(f"{seconds / 60:g} minutes, seed {seed}: {num_runs} runs, {num_faults} faults; {num_equal} of {num_runs} "
           "ended with the undisturbed run's weights")
    return 0 if num_equal == num_runs else 1


def _disturb(bench: Bench, name: str, num_ranks: int, draw: random.Random) -> str:
    """One start of a run under a fault; what it was, or nothing where the run ended before it came."""
    rank = draw.randrange(num_ranks)
    if draw.random() < 0.5:
        after_s = draw.uniform(0, bench.whole_seconds(num_ranks))
        outcome = bench.train(name, num_ranks=num_ranks, kill=(rank, after_s))
        return f"rank {rank} killed after {after_s:.2f} s" if outcome.killed else ""
    step = draw.randint(1, NUM_STEPS)
    fault = f"{draw.choice(RANDOM_POINTS)}:{step}:{rank}:{draw.choice(RANDOM_ACTIONS)}"
    return fault if bench.train(name, num_ranks=num_ranks, fault=fault).code else ""


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
