"""Which checkpoint a run directory stands for."""

from __future__ import annotations

from pathlib import Path

from prlhf.errors import CheckpointError
from prlhf.files import read_json

STATE = "state.json"  # of a checkpoint
FINAL = Path("eval") / "final.json"  # of a run directory


def checkpoint_name(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint directory itself, or the one of a run directory that its final evaluation is of (`eval.select`).

    Where training has gone on since, or there is no final evaluation yet, it is the newest complete one.

    Raises: CheckpointError: neither, or a final evaluation that cannot be read.
    """
    if (path / STATE).is_file():
        return path
    steps = sorted((path / "checkpoints").glob("step-[0-9]*"))
    if not steps:
        raise CheckpointError(
            f"{path}: neither a checkpoint nor a run directory with checkpoints; "
            "give runs/NAME or runs/NAME/checkpoints/step-00000100"
        )
    return _selected(path, steps) or steps[-1]


def _selected(run_dir: Path, steps: list[Path]) -> Path | None:
    """What the final evaluation chose, if the newest checkpoint is still the one that was last then."""
    if not (run_dir / FINAL).is_file():
        return None
    final = read_json(run_dir / FINAL)
    step, last = (final.get(name) if isinstance(final, dict) else None for name in ("step", "last_step"))
    if not isinstance(step, int) or not isinstance(last, int) or steps[-1].name != checkpoint_name(last):
        return None
    return next((path for path in steps if path.name == checkpoint_name(step)), None)
