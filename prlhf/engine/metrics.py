"""Figures of each optimizer step: summed on the device, reduced over ranks once a log interval."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prlhf.distributed import all_reduce_sum
from prlhf.engine.checkpoint import Progress
from prlhf.engine.run_dir import RunDir
from prlhf.engine.step import StepResult

logger = logging.getLogger(__name__)


class StepMetrics:
    """Collects steps and writes a line for each to metrics.jsonl.

    Args:
        names: of the figures, the same on every rank.
        counts: of figures that are not means over all rows, the figure that counts their rows.
    """

    def __init__(
        self, run_dir: RunDir, names: list[str], *, counts: Mapping[str, str] | None = None, log_every: int
    ) -> None:
        self._run_dir = run_dir
        self._names = names
        self._counts = counts or {}
        self._log_every = log_every
        self._steps: list[tuple[dict[str, Any], dict[str, Tensor], int]] = []

    def is_due(self, step: int) -> bool:
        """Whether a log interval ends at this step."""
        return step % self._log_every == 0

    def add(self, progress: Progress, result: StepResult, *, lr: float) -> None:
        """Take up one step; nothing is moved off the device."""
        known = {
            "step": progress.step,
            "learning_rate": lr,
            "grad_norm": result.grad_norm,
            "skipped": result.skipped,
            "seconds": progress.train_seconds,
            "rows": progress.rows_seen,
        }
        self._steps.append((known, result.sums, result.num_rows))

    def flush(self, step: int, max_steps: int, *, to_terminal: bool) -> dict[str, str]:
        """Reduce over ranks, write the lines, log one; returns the figures for a progress bar."""
        if not self._steps:
            return {}
        lines = self._reduce()
        self._run_dir.append_metrics(lines)
        shown = _summary(lines)
        if not to_terminal:
            rate = lines[-1]["rows"] / max(lines[-1]["seconds"], 1e-9)
            logger.info(
                "step %d/%d %s %.1f rows/s", step, max_steps, " ".join(f"{k} {v}" for k, v in shown.items()), rate
            )
        self._steps = []
        return shown

    def _reduce(self) -> list[dict[str, Any]]:
        """Means over the global rows of each step, or over those counted; a rank without rows adds zeros."""
        names = self._names
        table = torch.zeros(len(self._steps), len(names) + 1, dtype=torch.float64)
        for i, (_, sums, num_rows) in enumerate(self._steps):
            if sums:
                table[i, :-1] = torch.stack([sums[name] for name in names]).cpu().double()
            table[i, -1] = num_rows
        all_reduce_sum(table)
        lines = []
        for (known, _, _), values in zip(self._steps, table.tolist(), strict=True):
            totals = dict(zip(names, values[:-1], strict=True))
            counts = {name: totals[count] for name, count in self._counts.items()}
            means = {name: _mean(total, counts.get(name, values[-1])) for name, total in totals.items()}
            lines.append({**known, "grad_norm": _finite(float(known["grad_norm"])), **means})
        return lines


def _mean(value: float, count: float) -> float | None:
    return _finite(value / count) if count else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _summary(lines: list[dict[str, Any]]) -> dict[str, str]:
    """Mean over the interval of the figures worth a line."""
    shown = {}
    for name, label in (
        ("loss", "loss"),
        ("rewards/accuracies", "acc"),
        ("generic/rewards/accuracies", "generic"),
        ("nll/chosen", "nll"),
    ):
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            shown[label] = f"{sum(values) / len(values):.4f}"
    return shown
