"""simpo_loss, orpo_loss and orpo_term: golden numbers from the equations, lengths, gradients, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from prlhf.losses import orpo_loss, orpo_term, simpo_loss

# Mean log-probs -1 and -2 in row 0, -0.5 and -0.25 in row 1.
CHOSEN = torch.tensor([-4.0, -1.0], dtype=torch.float64)
REJECTED = torch.tensor([-4.0, -2.0], dtype=torch.float64)
LENGTHS = torch.tensor([4, 2]), torch.tensor([2, 8])
ROWS = (CHOSEN, REJECTED, *LENGTHS)


def test_simpo_of_two_rows():
    """beta 2, gamma 1: log(1 + exp(-(2 x 1 - 1))) = 0.31326169 and log(1 + exp(-(2 x -0.25 - 1))) = 1.70141328."""
    out = simpo_loss(*ROWS, beta=2.0, gamma=1.0)
    assert out.losses.tolist() == pytest.approx([0.31326169, 1.70141328], abs=5e-9)
    assert out.chosen_rewards.tolist() == pytest.approx([-2.0, -1.0])
    assert out.rejected_rewards.tolist() == pytest.approx([-4.0, -0.5])


def test_orpo_of_two_rows():
    """Log-odds of p = exp(-1), exp(-2): -0.54132485, -1.85458654; of exp(-0.5), exp(-0.25): 0.43275213, 1.25869155."""
    expected = [math.log1p(math.exp(-d)) for d in (-0.54132485 + 1.85458654, 0.43275213 - 1.25869155)]
    assert orpo_term(*ROWS).tolist() == pytest.approx(expected, abs=1e-7)


def test_orpo_loss_adds_the_nll_per_token():
    """NLL 1 and 0.5 a token; log(1 + exp(-1.31326169)) = 0.23818303, log(1 + exp(0.82593944)) = 1.18906993."""
    out = orpo_loss(*ROWS, beta=0.5)
    assert out.losses.tolist() == pytest.approx([1 + 0.5 * 0.23818303, 0.5 + 0.5 * 1.18906993], abs=1e-7)
    assert out.chosen_rewards.tolist() == pytest.approx([0.5 * -0.54132485, 0.5 * 0.43275213], abs=1e-7)
    with pytest.raises(ValueError, match="beta: got 0.0"):
        orpo_loss(*ROWS, beta=0.0)


@pytest.mark.parametrize("logp", [-1e-6, -1e-8, 0.0])
def test_orpo_is_finite_for_a_sure_token(logp):
    """exp(-1e-8) is 1 in float32, and log-probs of sure tokens are 0 exactly."""
    logps, other = torch.tensor([logp], requires_grad=True), torch.tensor([-1.0])
    term = orpo_term(logps, other, torch.tensor([1]), torch.tensor([1]))
    term.backward()
    assert torch.isfinite(term).all() and torch.isfinite(logps.grad).all()


def test_gradients_are_right():
    inputs = [rows.clone().requires_grad_() for rows in (CHOSEN, REJECTED)]
    assert torch.autograd.gradcheck(lambda c, r: simpo_loss(c, r, *LENGTHS, beta=2.0, gamma=0.5).losses, inputs)
    assert torch.autograd.gradcheck(lambda c, r: orpo_term(c, r, *LENGTHS), inputs)
    assert torch.autograd.gradcheck(lambda c, r: orpo_loss(c, r, *LENGTHS, beta=0.5).losses, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"gamma": -1.0}, "gamma: got -1.0"),
        ({"gamma": float("nan")}, "gamma: got nan"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        simpo_loss(*ROWS, **{"beta": 2.0, "gamma": 1.0, **change})


@pytest.mark.parametrize("loss", [lambda *rows: simpo_loss(*rows, beta=2.0, gamma=1.0), orpo_term])
def test_empty_responses_and_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(ValueError, match="rejected_lengths: got 0"):
        loss(CHOSEN, REJECTED, LENGTHS[0], torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="rows must all be \\(B,\\)"):
        loss(CHOSEN, REJECTED, LENGTHS[0], LENGTHS[1][:, None])
