"""The command `prlhf export`; what it needs is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prlhf export`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run or checkpoint directory")
    parser.add_argument("--format", required=True, choices=("peft", "merged", "vllm"),
                        help="peft: the adapter; merged: all weights; vllm: the adapter and how to serve it")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the export appears")


def run_export(args: argparse.Namespace) -> int:
    """Export, and say where it is."""
    from prlhf.serving.export import export_checkpoint

    export_checkpoint(args.checkpoint, args.format, args.out)
    sys.stdout.write(f"{args.out}\n")
    return 0
