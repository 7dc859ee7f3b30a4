"""The command `prlhf forget`; what it needs is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_forget_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prlhf forget`."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="a run, a checkpoint or what prlhf adapt wrote")
    parser.add_argument("--user", required=True, metavar="ID", help="who leaves")
    parser.add_argument("--data", type=Path, metavar="DIR", help="also take the user's rows out of this prepared data")


def run_forget(args: argparse.Namespace) -> int:
    """Forget, and print the receipt."""
    from prlhf.adapt.forget import forget_user, format_receipt

    sys.stdout.write(format_receipt(forget_user(args.directory, args.user, data=args.data)))
    return 0
