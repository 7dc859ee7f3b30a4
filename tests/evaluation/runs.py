"""Run directories made by hand, for what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.evaluation.test_report import block, final_of


def write_run(
    folder: Path, *, final: dict[str, Any] | None = None, samples: bool = True, evaluations: bool = True
) -> Path:
    """Three steps of training, two evaluations, answers of ann and bob to two prompts."""
    for name in ("eval", "samples"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text("name: exp\nseed: 3\n")
    lines = [
        {"step": step, "loss": 1.0 / step, "grad_norm": 2.0, "learning_rate": 0.1 * step, "rewards/accuracies": 0.5,
         "generic/rewards/accuracies": 0.25}
        for step in (1, 2, 3)
    ]  # fmt: skip
    lines[1]["loss"] = None  # not finite
    write_lines(folder / "metrics.jsonl", lines)
    if final is not None:
        (folder / "eval" / "final.json").write_text(json.dumps(final))
    if evaluations:
        for step, mean in ((100, 0.5), (20, 0.25)):
            accuracy = {"seen": block(mean), "generic": None}
            text = json.dumps({"step": step, "accuracy": accuracy})
            (folder / "eval" / f"step-{step:08d}.json").write_text(text)
    if samples:
        answers = {"ann": ["one", "one two"], "bob": ["one two three", "one two three four five"]}
        write_lines(
            folder / "samples" / "policy.jsonl",
            [{"user_id": user, "prompt": f"Q{i}", "response": text} for user, texts in answers.items()
             for i, text in enumerate(texts)],
        )  # fmt: skip
        write_lines(folder / "samples" / "reference.jsonl", [{"user_id": "ann", "prompt": "Q0", "response": "so so"}])
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished_run(folder: Path, **changes: Any) -> Path:
    return write_run(folder, final=final_of(**changes))
