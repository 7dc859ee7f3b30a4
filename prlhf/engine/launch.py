"""Start a run on every rank: `python -m prlhf.engine.launch CONFIG [key=value ...]`, alone or under torchrun."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from prlhf.config import load_config
from prlhf.distributed import init_process_group, is_main, teardown
from prlhf.errors import Preempted, PrlhfError

logger = logging.getLogger(__name__)

EXIT_BAD_INPUT = 2
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `prlhf train` and this module share."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as experiments/psoups.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as train.lr=1e-4")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of run directories (default: runs)")
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="where to go on from (default: auto)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="resolve, load, tokenize, print sizes and estimates, stop"
    )


def run_training(args: argparse.Namespace) -> int:
    """Train as the arguments say, in this process; the exit code."""
    config = load_config(args.config, args.overrides)
    run_dir = Path(args.runs) / config.name
    if args.dry_run:
        from prlhf.engine.dry_run import describe_job

        sys.stdout.write(describe_job(config, run_dir))
        return 0
    from prlhf.engine.trainer import train

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


def configure_logging() -> None:
    """Messages to stderr: everything from rank 0, warnings from the others."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("prlhf").setLevel(level)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def report_errors(run: object, args: argparse.Namespace) -> int:
    """Call `run(args)`; a user's mistake becomes one line an error on stderr, and its exit code."""
    try:
        return run(args)  # type: ignore[operator]
    except PrlhfError as error:
        for message in error.messages:
            sys.stderr.write(f"error: {message}\n")
        return error.exit_code
    except Preempted as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        path = Path(error.filename or getattr(args, "runs", "."))
        free = shutil.disk_usage(path if path.exists() else Path.cwd()).free
        sys.stderr.write(
            f"error: {path}: {error.strerror}; {free / 2**20:.0f} MiB free; make room, or write to another folder\n"
        )
        return EXIT_BAD_INPUT


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
