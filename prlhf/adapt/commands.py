"""The commands `prlhf adapt` and `prlhf forget`; what they need is imported when they run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_adapt_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prlhf adapt`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run or checkpoint directory")
    parser.add_argument(
        "--feedback", type=Path, metavar="F",
        help=".jsonl: chosen and rejected, or responses and choice, or response and label, or edited",
    )
    parser.add_argument(
        "--user", metavar="ID",
        help="whose rows they are, where they do not say so (user_id); --user=-x where an id begins with a dash",
    )
    parser.add_argument("--held-out", type=Path, metavar="F", help="more of the same, to measure on")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the checkpoint with the new users appears")
    parser.add_argument(
        "--ask", type=int, metavar="N",
        help="print the N pairs of --pool to ask the user about next; with 0 or 1 as choice they are lines of feedback",
    )
    parser.add_argument(
        "--pool", type=Path, metavar="F",
        help=".jsonl: chosen and rejected, in either order; new users may then want the opposite of a known taste, too",
    )


def run_adapt(args: argparse.Namespace) -> int:
    """Fit, write and report."""
    from prlhf.adapt.new_users import add_new_users

    return add_new_users(args)


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
