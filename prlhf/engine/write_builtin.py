"""Put a pretrained run into the package as `builtin:tiny`: `python -m prlhf.engine.write_builtin runs/builtin_base`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prlhf.engine.launch import configure_logging, report_errors
from prlhf.models.assemble import load_policy
from prlhf.models.backbone import builtin_model_dir, save_backbone


def write_builtin(args: argparse.Namespace) -> int:
    """Save the run's backbone and tokenizer, weights in bf16, where `builtin:tiny` is loaded from."""
    policy = load_policy(args.run_dir)
    save_backbone(policy.backbone, policy.tokenizer, args.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="prlhf.engine.write_builtin", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="a finished run of experiments/builtin_base.yaml")
    parser.add_argument("--out", type=Path, default=builtin_model_dir(), help="default: the package's own folder")
    configure_logging()
    return report_errors(write_builtin, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
