"""Which weights a run ends with: `eval.select`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from prlhf.engine.build import Job
from prlhf.engine.checkpoint import Progress, best_checkpoint, step_of
from prlhf.engine.final import evaluate_step
from prlhf.engine.fsdp import whole_weights
from prlhf.errors import DataError
from prlhf.models.assemble import load_trained_

logger = logging.getLogger(__name__)


def check_selection(job: Job) -> None:
    """Refuse, before training, a choice that has nothing to go by.

    Raises: DataError: `eval.select` is dev and there are no dev rows.
    """
    if job.config.eval.select == "dev" and (job.preferences is None or not job.preferences.dev):
        raise DataError(f"data.source {job.config.data.source!r}: has no dev rows, which eval.select dev goes by; "
                        "add a dev.jsonl or set eval.select last")


def select_weights_(job: Job, progress: Progress, run_dir: Path, *, on_batch: Callable[[], None]) -> int:
    """Give a trained model the weights of the best checkpoint on dev rows, where `eval.select` asks for it.

    The last step is evaluated on them, too. Of equal ones the earliest is taken.

    Args:
        on_batch: called between batches; may raise to stop.
    Returns: the step of the weights that the model has.
    Raises: CheckpointError: the checkpoint cannot be read.
    """
    if job.config.eval.select == "last":
        return progress.step
    with whole_weights(job.model):
        evaluate_step(job, progress, run_dir, on_batch=on_batch)
    best = best_checkpoint(run_dir)
    step = progress.step if best is None else step_of(best)
    if best is not None and step != progress.step:
        logger.info("step %d is the best of those evaluated on dev rows; the final evaluation is of it", step)
        load_trained_(job.model, best, lora=job.config.model.lora is not None)
    return step
