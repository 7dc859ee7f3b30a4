"""pdpo_loss: the alpha-weighted sum of two DPO losses, row by row, and what alpha trains."""

from __future__ import annotations

import pytest
import torch

from prlhf.losses import dpo_loss, pdpo_loss
from prlhf.usermodel import IndividualUserModel


def _logps(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [-10 * torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_pdpo_of_an_individual_margin_2_and_a_generic_margin_0():
    """alpha 0.25, beta 1: 0.25 x 0.12692801 + 0.75 x 0.69314718 = 0.55159239."""
    two, zero = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    out = pdpo_loss(two, zero, zero, zero, zero, zero, alpha=0.25, beta=1.0)
    assert out.losses.item() == pytest.approx(0.55159239, abs=5e-9)


@pytest.mark.parametrize(("kind", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_each_row_is_the_weighted_sum_of_its_two_terms(alpha, kind, label_smoothing):
    """Each row alone, through dpo_loss, one row at a time."""
    settings = {"beta": 0.4, "kind": kind, "label_smoothing": label_smoothing}
    rows = _logps(6)
    losses = pdpo_loss(*rows, alpha=alpha, **settings).losses
    for row in range(5):
        alone = [logps[row : row + 1] for logps in rows]
        own = dpo_loss(*alone[0:2], *alone[4:6], **settings).losses.item()
        generic = dpo_loss(*alone[2:4], *alone[4:6], **settings).losses.item()
        assert losses[row].item() == pytest.approx(alpha * own + (1 - alpha) * generic, rel=1e-12)


def test_terms_keep_their_own_losses_and_rewards():
    rows = _logps(6)
    out = pdpo_loss(*rows, alpha=0.3, beta=0.4)
    own = dpo_loss(rows[0], rows[1], rows[4], rows[5], beta=0.4)
    generic = dpo_loss(rows[2], rows[3], rows[4], rows[5], beta=0.4)
    for name in ("losses", "chosen_rewards", "rejected_rewards"):
        assert torch.equal(getattr(out.individual, name), getattr(own, name))
        assert torch.equal(getattr(out.generic, name), getattr(generic, name))


def test_pdpo_gradient_is_right():
    inputs = [logps.requires_grad_() for logps in _logps(6)]
    assert torch.autograd.gradcheck(lambda *rows: pdpo_loss(*rows, alpha=0.3, beta=0.4).losses, inputs)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha: got"):
        pdpo_loss(*_logps(6), alpha=alpha, beta=0.1)


@pytest.mark.parametrize("position", range(6))
def test_shapes_that_would_broadcast_are_refused(position):
    rows = _logps(6)
    rows[position] = rows[position][:, None]
    with pytest.raises(ValueError, match="rows must all be \\(B,\\)"):
        pdpo_loss(*rows, alpha=0.5, beta=0.1)


def _gradients(alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (of e_0, of the offsets) when a user's soft prompt is that user's log-probs of two responses."""
    users = IndividualUserModel(num_users=2, num_user_tokens=1, dim=2)
    users.init_(torch.tensor([[0.3, -0.2]]))
    user_ids = torch.tensor([1, 2, 1])
    own, generic = users(user_ids)[:, 0], users(torch.zeros_like(user_ids))[:, 0]
    reference = torch.zeros(3)
    out = pdpo_loss(*own.unbind(1), *generic.unbind(1), reference, reference, alpha=alpha, beta=0.5)
    out.losses.sum().backward()
    return users.generic.grad, users.offsets.grad


def test_alpha_0_gives_the_offsets_exactly_no_gradient():
    generic, offsets = _gradients(0.0)
    assert torch.equal(offsets, torch.zeros_like(offsets))
    assert (generic != 0).all()


def test_alpha_1_trains_the_generic_user_through_the_individual_ones():
    """e_i = e_0 + o_i, so the gradient of e_0 is the sum of the offsets' gradients."""
    generic, offsets = _gradients(1.0)
    assert (generic != 0).all()
    torch.testing.assert_close(generic, offsets.sum(dim=0))


def test_alpha_between_trains_both():
    """At alpha 1/2 and equal margins e_0 gets from the generic term as much as it gets through the offsets."""
    generic, offsets = _gradients(0.5)
    torch.testing.assert_close(generic, 2 * offsets.sum(dim=0))
