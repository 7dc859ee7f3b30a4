"""The command `prlhf data prepare`: raw files -> a prepared directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from prlhf.data.convarg import prepare_convarg
from prlhf.data.jsonl_prepare import JsonlOptions, prepare_jsonl
from prlhf.data.load import BUILTIN_PREFERENCES, load_preference_data
from prlhf.data.prepared import PreparedSummary, check_writable, write_prepared
from prlhf.data.prism import prepare_prism
from prlhf.data.psoups import prepare_psoups
from prlhf.data.splits import MAX_SEED
from prlhf.data.tldr import MAX_USERS, prepare_tldr
from prlhf.errors import DataError

FORMATS = ("jsonl", "psoups", "tldr", "prism", "convarg", *BUILTIN_PREFERENCES)
EVAL_PROMPTS = 0.1
PRISM_UNSEEN_USERS = 0.1
CONVARG_MIN_JUDGMENTS = 40


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prlhf data prepare`."""
    parser.add_argument("format", metavar="FORMAT", choices=FORMATS, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--raw", type=Path, metavar="PATH", help="the raw file (jsonl) or folder")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the prepared directory appears")
    parser.add_argument("--unseen-users", type=float, metavar="SHARE",
                        help=f"of the users, held out (default: 0; prism: {PRISM_UNSEEN_USERS})")
    parser.add_argument("--eval-prompts", type=float, default=EVAL_PROMPTS, metavar="SHARE",
                        help="of the prompts, held out")
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--force", action="store_true", help="replace an earlier prepared directory")
    own = parser.add_argument_group("jsonl")
    own.add_argument("--map", nargs="+", action="extend", default=[], metavar="FIELD=COLUMN",
                     help="user_id=annotator; prompt=instruction,input joins columns; user_id=@me is a constant")
    own.add_argument("--drop", nargs="+", action="extend", default=[], metavar="COLUMN=VALUE",
                     help="leave out rows with this value")
    own.add_argument("--opposed", nargs=2, metavar=("USER", "USER"),
                     help="without a user column: every pair for the first as mapped, for the second swapped")
    convarg = parser.add_argument_group("convarg")
    convarg.add_argument("--min-judgments", type=int, default=CONVARG_MIN_JUDGMENTS, metavar="N",
                         help="leave out workers with fewer strict judgments")
    convarg.add_argument("--max-users", type=int, metavar="N",
                         help=f"keep the N most active workers; also for tldr (default there: {MAX_USERS})")
    convarg.add_argument("--hold-out", choices=("pairs", "debates"), default="pairs",
                         help="what evaluation shares with no training row")


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare, and say what was written.

    Raises: DataError: bad arguments or data, or an output directory that is not empty.
    """
    sys.stdout.write(f"{_prepare(args)}\n")
    return 0


def _prepare(args: argparse.Namespace) -> PreparedSummary:
    _refuse_foreign_options(args)
    _refuse_numbers_out_of_range(args)
    if args.format in BUILTIN_PREFERENCES:
        check_writable(args.out, force=args.force)
        data = load_preference_data(args.format, seed=args.seed, eval_prompts=0.0, unseen_users=0.0)
        return write_prepared(args.out, data, force=args.force)
    if args.raw is None:
        raise DataError(f"prlhf data prepare {args.format}: no --raw PATH; name the raw file or folder")
    _refuse_raw_in_out(args.raw, args.out)
    if args.format == "tldr":
        max_users = MAX_USERS if args.max_users is None else args.max_users
        return prepare_tldr(args.raw, args.out, seed=args.seed, max_users=max_users, force=args.force)
    unseen_users = PRISM_UNSEEN_USERS if args.format == "prism" else 0.0
    if args.unseen_users is not None:
        unseen_users = args.unseen_users
    shares = {"unseen_users": unseen_users, "eval_prompts": args.eval_prompts}
    if args.format == "psoups":
        return prepare_psoups(args.raw, args.out, **shares, seed=args.seed, force=args.force)
    if args.format == "prism":
        return prepare_prism(args.raw, args.out, **shares, seed=args.seed, force=args.force)
    if args.format == "convarg":
        return prepare_convarg(
            args.raw, args.out, **shares, seed=args.seed, force=args.force,
            min_judgments=args.min_judgments, max_users=args.max_users, hold_out=args.hold_out,
        )
    options = JsonlOptions(tuple(args.map), tuple(args.drop), tuple(args.opposed) if args.opposed else None)
    return prepare_jsonl(args.raw, args.out, options=options, **shares, seed=args.seed, force=args.force)


def _refuse_raw_in_out(raw: Path, out: Path) -> None:
    """Replacing the directory would delete what it is made of."""
    inside = raw.expanduser().resolve()
    if out.expanduser().resolve() in (inside, *inside.parents):
        raise DataError(f"--raw {raw}: lies in --out {out}, which is replaced as a whole; choose another --out")


def _refuse_foreign_options(args: argparse.Namespace) -> None:
    """An option that a format does not read would be ignored in silence."""
    foreign: dict[str, tuple[tuple[str, ...], Any]] = {
        "--map, --drop, --opposed": (("jsonl",), args.map or args.drop or args.opposed),
        "--min-judgments, --hold-out": (
            ("convarg",), args.min_judgments != CONVARG_MIN_JUDGMENTS or args.hold_out != "pairs"
        ),
        "--max-users": (("convarg", "tldr"), args.max_users is not None),
        "--unseen-users, --eval-prompts": (
            ("jsonl", "psoups", "prism", "convarg"),
            args.unseen_users is not None or args.eval_prompts != EVAL_PROMPTS,
        ),
    }
    messages = [
        f"prlhf data prepare {args.format}: {options} are for {' and '.join(homes)} only; leave them out"
        for options, (homes, given) in foreign.items()
        if given and args.format not in homes
    ]
    if args.raw is not None and args.format.startswith("builtin:"):
        messages.append(f"prlhf data prepare {args.format}: --raw is for data of your own; leave it out")
    if messages:
        raise DataError(*messages)


def _refuse_numbers_out_of_range(args: argparse.Namespace) -> None:
    """Shares are refused where they are drawn."""
    messages = [
        f"{option}: got {count}, expected 1 or more"
        for option, count in (("--min-judgments", args.min_judgments), ("--max-users", args.max_users))
        if count is not None and count < 1
    ]
    if not 0 <= args.seed <= MAX_SEED:
        messages.append(f"--seed: got {args.seed}, expected 0 to {MAX_SEED}")
    if messages:
        raise DataError(*messages)
