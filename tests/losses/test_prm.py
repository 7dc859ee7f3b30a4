"""bradley_terry_loss and prm_loss: golden numbers, the weighted sum of two terms, gradients, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prlhf.losses import bradley_terry_loss, prm_loss


def _scores(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_bradley_terry_of_margins_0_1_2():
    """log(1 + exp(-d)) of d = 0, 1, 2, whatever the level of the scores."""
    chosen, rejected = torch.tensor([3.0, 0.5, -7.0]), torch.tensor([3.0, -0.5, -9.0])
    out = bradley_terry_loss(chosen, rejected)
    assert out.losses.tolist() == pytest.approx([0.69314718, 0.31326169, 0.12692801], abs=1e-7)


def test_rewards_are_the_scores_without_gradient():
    chosen, rejected = (scores.requires_grad_() for scores in _scores(2))
    out = bradley_terry_loss(chosen, rejected)
    assert torch.equal(out.chosen_rewards, chosen) and torch.equal(out.rejected_rewards, rejected)
    assert out.losses.requires_grad
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad


def test_prm_of_an_individual_margin_2_and_a_generic_margin_0():
    """alpha 0.25: 0.25 x 0.12692801 + 0.75 x 0.69314718 = 0.55159239."""
    two, zero = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    assert prm_loss(two, zero, zero, zero, alpha=0.25).losses.item() == pytest.approx(0.55159239, abs=5e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_each_row_is_the_weighted_sum_of_its_two_terms(alpha):
    """log(1 + exp(-d)) by numpy's logaddexp, one row at a time."""
    rows = _scores(4)
    own, generic = (np.logaddexp(0, -(rows[i] - rows[i + 1]).numpy()) for i in (0, 2))
    expected = alpha * own + (1 - alpha) * generic
    assert prm_loss(*rows, alpha=alpha).losses.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_gradients_are_right():
    inputs = [scores.requires_grad_() for scores in _scores(4)]
    assert torch.autograd.gradcheck(lambda *rows: bradley_terry_loss(*rows).losses, inputs[:2])
    assert torch.autograd.gradcheck(lambda *rows: prm_loss(*rows, alpha=0.3).losses, inputs)


@pytest.mark.parametrize("position", range(4))
def test_shapes_that_would_broadcast_are_refused(position):
    rows = _scores(4)
    rows[position] = rows[position][:, None]
    with pytest.raises(ValueError, match="rows must all be \\(B,\\)"):
        prm_loss(*rows, alpha=0.5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha: got"):
        prm_loss(*_scores(4), alpha=alpha)
