"""kto_loss: golden numbers, what moves it, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from prlhf.losses import kto_loss

# Log-ratios 1, 1, -2 nats.
POLICY = torch.tensor([-4.0, -9.0, -12.0], dtype=torch.float64)
REFERENCE = torch.tensor([-5.0, -10.0, -10.0], dtype=torch.float64)
LABELS = torch.tensor([True, False, False])


def test_kto_of_three_rows():
    """beta 0.5, z = 0.4: 1 - sigmoid(0.3) = 0.42555748 up; 1 - sigmoid(-0.3) = 0.57444252 and
    1 - sigmoid(1.2) = 0.23147522 down, these two times 1.5."""
    out = kto_loss(POLICY, REFERENCE, LABELS, 0.4, beta=0.5, undesirable_weight=1.5)
    assert out.losses.tolist() == pytest.approx([0.42555748, 1.5 * 0.57444252, 1.5 * 0.23147522], abs=5e-8)
    assert out.rewards.tolist() == pytest.approx([0.5, 0.5, -1.0])


def test_a_negative_estimate_of_the_kl_counts_as_0():
    below, zero = (kto_loss(POLICY, REFERENCE, LABELS, kl, beta=0.5).losses for kl in (-3.0, 0.0))
    assert torch.equal(below, zero)


def test_thumbs_up_pull_and_thumbs_down_push():
    policy = POLICY.clone().requires_grad_()
    kl = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    kto_loss(policy, REFERENCE, LABELS, kl, beta=0.5).losses.sum().backward()
    assert policy.grad[0] < 0 < policy.grad[1:].min()
    assert kl.grad is None, "the estimate of the KL carries no gradient"


def test_gradient_is_right():
    policy = POLICY.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: kto_loss(rows, REFERENCE, LABELS, 0.4, beta=0.5).losses, policy)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (LABELS.long(), {"beta": 0.5}, "labels: got torch.int64"),
        (LABELS[:, None], {"beta": 0.5}, "rows must all be"),
        (LABELS, {"beta": 0.0}, "beta: got 0.0"),
        (LABELS, {"beta": 0.5, "desirable_weight": -1.0}, "weights: got -1.0 and 1.0"),
    ],
)
def test_bad_input_is_refused(labels, settings, message):
    with pytest.raises(ValueError, match=message):
        kto_loss(POLICY, REFERENCE, labels, 0.4, **settings)
