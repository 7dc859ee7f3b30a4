"""A loss far above the usual one is known from a mean that forgets."""

from __future__ import annotations

import math

import pytest

from prlhf.engine.checkpoint import Progress
from prlhf.engine.spikes import loss_limit, take_up_loss_


def after(losses: list[float]) -> Progress:
    progress = Progress()
    for loss in losses:
        take_up_loss_(progress, loss)
    return progress


def test_without_a_factor_there_is_no_limit() -> None:
    assert loss_limit(after([1.0] * 100), None) is None


def test_the_first_steps_have_no_limit() -> None:
    assert loss_limit(after([1.0] * 19), 2.0) == math.inf
    assert loss_limit(after([1.0] * 20), 2.0) == pytest.approx(2.0)


def test_the_usual_loss_is_a_mean_with_weights_that_fall_by_a_twentieth_a_step() -> None:
    losses = [0.5 + 0.1 * i for i in range(30)]
    weights = [0.95 ** (29 - i) for i in range(30)]
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert loss_limit(after(losses), 3.0) == pytest.approx(3.0 * mean)
