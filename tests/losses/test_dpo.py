"""dpo_loss: golden numbers, rewards, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from prlhf.losses import dpo_loss

# Policy log-probs whose margins over the reference's are 0, 1, 2.
CHOSEN = torch.tensor([-10.0, -9.5, -7.0], dtype=torch.float64)
REJECTED = torch.tensor([-20.0, -20.5, -20.0], dtype=torch.float64)
REFERENCE_CHOSEN = torch.tensor([-10.0, -10.0, -8.0], dtype=torch.float64)
REFERENCE_REJECTED = torch.tensor([-20.0, -20.0, -19.0], dtype=torch.float64)


def test_dpo_of_margins_0_1_2():
    """h = (policy chosen - reference chosen) - (policy rejected - reference rejected):

    row 0: 0 - 0 = 0, row 1: 0.5 + 0.5 = 1, row 2: 1 + 1 = 2; log(1 + exp(-h)) = 0.69314718, 0.31326169, 0.12692801.
    """
    out = dpo_loss(CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED, beta=1.0)
    assert out.losses.tolist() == pytest.approx([0.69314718, 0.31326169, 0.12692801], abs=5e-9)


def test_ipo_of_margins_0_1_2():
    """(h - 1 / (2 beta))^2 at beta 0.25, target 2: 4, 1, 0."""
    out = dpo_loss(CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED, beta=0.25, kind="ipo")
    assert out.losses.tolist() == pytest.approx([4.0, 1.0, 0.0], abs=1e-12)


def test_smoothed_dpo_of_margin_1():
    """eps 0.1: 0.9 x 0.31326169 + 0.1 x 1.31326169 = 0.41326169."""
    out = dpo_loss(CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED, beta=1.0, label_smoothing=0.1)
    assert out.losses[1].item() == pytest.approx(0.41326169, abs=5e-9)


def test_rewards_are_beta_times_the_log_ratio():
    """Chosen ratios 0, 0.5, 1 and rejected ones 0, -0.5, -1, times beta 0.1, whatever the kind."""
    for kind in ("sigmoid", "ipo"):
        out = dpo_loss(CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED, beta=0.1, kind=kind)
        assert out.chosen_rewards.tolist() == pytest.approx([0.0, 0.05, 0.1], abs=1e-12)
        assert out.rejected_rewards.tolist() == pytest.approx([0.0, -0.05, -0.1], abs=1e-12)


def test_rewards_carry_no_gradient_and_losses_do():
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    out = dpo_loss(chosen, rejected, REFERENCE_CHOSEN, REFERENCE_REJECTED, beta=0.1)
    assert out.losses.requires_grad
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad


@pytest.mark.parametrize(("kind", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_dpo_gradient_is_right(kind, label_smoothing):
    inputs = [logps.clone().requires_grad_() for logps in (CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)]
    assert torch.autograd.gradcheck(
        lambda *logps: dpo_loss(*logps, beta=0.5, kind=kind, label_smoothing=label_smoothing).losses, inputs
    )


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("shape", [(2,), (3, 1), ()])
def test_shapes_that_would_broadcast_are_refused(position, shape):
    inputs = [CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED]
    inputs[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match="rows must all be \\(B,\\)"):
        dpo_loss(*inputs, beta=0.1)


def test_matrices_of_one_shape_are_refused():
    with pytest.raises(ValueError, match="rows must all be \\(B,\\)"):
        dpo_loss(*[torch.zeros(3, 2)] * 4, beta=0.1)
