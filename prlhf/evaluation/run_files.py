"""What a run directory holds, finished or not, as plain values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prlhf.errors import DataError
from prlhf.evaluation.report import load_final
from prlhf.files import read_json
from prlhf.models.run_folder import FINAL, STATE

FIGURES = "figures.json"  # of a checkpoint to which users were added
BASE_PARTS = ("run", "step", "data", "accuracy", "per_user")


@dataclass(frozen=True)
class RunFiles:
    """One run.

    Args:
        metrics: a dict a step.
        evaluations: those during training, by step.
        final: None until the run is finished.
        samples: "policy", "reference" and "generic" -> rows; empty where nothing was sampled.
    """

    name: str
    config: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    final: dict[str, Any] | None
    samples: dict[str, list[dict[str, Any]]]


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """Runs under names that tell them apart.

    Raises: DataError: a line for each folder that is no run directory, or a file of one that cannot be read.
    """
    strange = [folder for folder in folders if not (folder / "config.yaml").is_file()]
    if strange:
        raise DataError(*(f"{folder}: no run directory (no config.yaml); give runs/NAME" for folder in strange))
    names = [folder.resolve().name for folder in folders]
    return [
        _read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def final_beside(checkpoint: Path) -> dict[str, Any] | None:
    """The final evaluation of the run that a checkpoint lies in; None where there is none, or of another step."""
    folder = checkpoint.resolve().parent
    if folder.name != "checkpoints":
        return None
    try:
        final = load_final(folder.parent)
    except DataError:
        return None
    return final if final.get("step") == read_json(checkpoint / STATE)["step"] else None


def kept_figures(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint that `prlhf adapt` wrote keeps of figures; {} for others.

    Returns: "base", the parts `BASE_PARTS` of the final evaluation of the run that users were added to and its "run",
        or None where it had none; and "added", a record of each user added: "user_id", "judgments", "probability",
        "leave_one_out", "held_out".
    """
    return read_json(checkpoint / FIGURES) if (checkpoint / FIGURES).is_file() else {}


def base_figures(checkpoint: Path) -> dict[str, Any] | None:
    """The final evaluation beside a checkpoint, or what an adapted one keeps of its base's, which has "run"."""
    return final_beside(checkpoint) or kept_figures(checkpoint).get("base")


def figures_with_users(checkpoint: Path, added: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint made from this one keeps, with users added to it; see `kept_figures`."""
    base = base_figures(checkpoint)
    if base is not None:
        home = checkpoint.resolve().parents[1].name
        base = {"run": home, **{name: base[name] for name in BASE_PARTS if name in base}}
    return {"base": base, "added": [*kept_figures(checkpoint).get("added", []), *added]}


def _read_run(folder: Path, name: str) -> RunFiles:
    steps = [_read(path, json.loads) for path in sorted((folder / "eval").glob("step-*.json"))]
    return RunFiles(
        name=name,
        config=_read(folder / "config.yaml", str),
        metrics=_read_lines(folder / "metrics.jsonl"),
        evaluations=sorted(steps, key=lambda evaluation: evaluation["step"]),
        final=load_final(folder) if (folder / FINAL).exists() else None,
        samples={
            who: rows
            for who in ("policy", "reference", "generic")
            if (rows := _read_lines(folder / "samples" / f"{who}.jsonl"))
        },
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of ours; none when it is not there. A run that is being written may end in half a line."""
    if not path.exists():
        return []
    lines = _read(path, str).split("\n")[:-1]
    return [_parse(line, json.loads, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _read(path: Path, parse: Any) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return _parse(text, parse, str(path))


def _parse(text: str, parse: Any, where: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}); train or evaluate the run again") from None
