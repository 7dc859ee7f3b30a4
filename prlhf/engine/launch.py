"""Start a run on every rank: `python -m prlhf.engine.launch CONFIG [key=value ...]`, alone or under torchrun."""

from __future__ import annotations

import argparse
import ctypes
import errno
import faulthandler
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prlhf.config import load_config
from prlhf.distributed import PULSE_VARIABLE, first_to_say, init_process_group, is_main, start_pulse, teardown
from prlhf.engine.faults import arm_faults
from prlhf.errors import ConfigError, Preempted, PrlhfError

logger = logging.getLogger(__name__)

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as shells have it for SIGINT
EXIT_NOBODY_READS = 141  # and for SIGPIPE
MAX_LINES = 20  # of one kind of mistake that a file may hold on every line
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BAD_PATH = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `prlhf train` and this module share."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as experiments/psoups.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as train.lr=1e-4")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of run directories (default: runs)")
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="where to go on from (default: auto)"
    )
    parser.add_argument(
        "--nproc", type=int, default=1, metavar="N", help="ranks to start on this machine (default: 1)"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="R",
        help="how often to go on from the last checkpoint after a rank has died or hung (default: 0)",
    )
    parser.add_argument(
        "--hang-after", type=float, default=20.0, metavar="S",
        help="seconds without work after which a rank counts as hung (default: 20)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="resolve, load, tokenize, print sizes and estimates, stop"
    )


def run_training(args: argparse.Namespace) -> int:
    """Train as the arguments say, in this process or as several ranks; the exit code."""
    if args.nproc < 1 or args.max_restarts < 0 or args.hang_after <= 0:
        raise ConfigError("train: --nproc is 1 or more, --max-restarts 0 or more, --hang-after above 0")
    config = load_config(args.config, args.overrides)
    run_dir = Path(args.runs) / config.name
    arm_faults()
    if args.dry_run:
        from prlhf.engine.dry_run import describe_job

        sys.stdout.write(describe_job(config, run_dir))
        return 0
    if args.nproc > 1 or args.max_restarts > 0:
        return _run_supervised(args, run_dir)
    from prlhf.engine.trainer import train

    _obey_supervisor()
    device = config.train.device
    init_process_group("cuda" if device in ("auto", "cuda") and _cuda_available() else "cpu")
    try:
        final = train(config, run_dir, resume=args.resume)
        if is_main():
            from prlhf.evaluation.report import format_run

            sys.stdout.write(format_run(final, run_dir))
        return 0
    finally:
        teardown()


def _run_supervised(args: argparse.Namespace, run_dir: Path) -> int:
    from prlhf.engine.supervise import run_ranks

    def start(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """One rank."""
        begun_again = environment["TORCHELASTIC_RESTART_COUNT"] != "0" and any(run_dir.glob("checkpoints/step-*"))
        resume = "auto" if begun_again else args.resume
        command = [sys.executable, "-m", "prlhf.engine.launch", args.config, *args.overrides]
        command += ["--runs", args.runs, "--resume", resume]
        return subprocess.Popen(command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)

    return run_ranks(
        start, run_dir, num_ranks=args.nproc, max_restarts=args.max_restarts, hang_after_s=args.hang_after
    )


def _obey_supervisor() -> None:
    """Where `run_ranks` started this process: signs of life, stacks when it asks for them, and an end when it ends."""
    if PULSE_VARIABLE not in os.environ:
        return
    start_pulse()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def configure_logging() -> None:
    """Messages to stderr: everything from rank 0, warnings from the others."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("prlhf").setLevel(level)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def report_errors(run: object, args: argparse.Namespace) -> int:
    """Call `run(args)`; a user's mistake becomes one line an error on stderr, on whichever rank, and its exit code.

    So do Ctrl-C, and a reader of the output that has left, of whom nothing is said.
    """
    try:
        code: int = run(args)  # type: ignore[operator]
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except PrlhfError as error:
        for message in error.messages[:MAX_LINES]:
            _say(f"error: {message}")
        if len(error.messages) > MAX_LINES:
            _say(f"error: {len(error.messages) - MAX_LINES} more such lines")
        return error.exit_code
    except Preempted as error:
        _say(str(error))
        return error.exit_code
    except OSError as error:
        if error.errno == errno.EPIPE and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it ends
            return EXIT_NOBODY_READS
        if error.errno not in FULL_DISK + BAD_PATH:
            raise
        path = Path(error.filename or getattr(args, "runs", "."))
        free = shutil.disk_usage(path if os.path.exists(path) else Path.cwd()).free
        remedy = "choose another path" if error.errno in BAD_PATH else (
            f"{free / 2**20:.0f} MiB free; make room, or write to another folder")
        _say(f"error: {path}: {error.strerror}; {remedy}")
        return EXIT_BAD_INPUT


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _say(line: str) -> None:
    if first_to_say(line):
        sys.stderr.write(f"{line}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m prlhf.engine.launch`."""
    parser = argparse.ArgumentParser(prog="prlhf.engine.launch", description=__doc__)
    add_train_arguments(parser)
    configure_logging()
    return report_errors(run_training, parser.parse_intermixed_args(argv))


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
