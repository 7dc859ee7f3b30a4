"""Steps whose loss is out of all proportion: bad rows, as a rule, that would undo what was learned."""

from __future__ import annotations

import math

from prlhf.engine.checkpoint import Progress

DECAY = 0.95  # a step's weight in the mean halves every 14 steps
NUM_FIRST_STEPS = 20  # until the mean says something


def loss_limit(progress: Progress, factor: float | None) -> float | None:
    """The mean loss above which a step is skipped: `factor` times what was usual of late; None without one."""
    if factor is None:
        return None
    if progress.num_usual_losses < NUM_FIRST_STEPS:
        return math.inf
    return factor * progress.usual_loss / (1 - DECAY**progress.num_usual_losses)


def take_up_loss_(progress: Progress, mean_loss: float) -> None:
    """Count the loss of a step that was not skipped among the usual ones."""
    progress.usual_loss = DECAY * progress.usual_loss + (1 - DECAY) * mean_loss
    progress.num_usual_losses += 1
