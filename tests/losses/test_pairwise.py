"""Functions of the margin: golden numbers, formulas, gradients, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from prlhf.losses import PAIRWISE_LOSSES, compute_pairwise_losses


def test_sigmoid_of_margins_0_1_2():
    """-log sigmoid(m) = log(1 + exp(-m)):

    ln 2 = 0.69314718, ln 1.36787944 = 0.31326169, ln 1.13533528 = 0.12692801.
    """
    losses = compute_pairwise_losses(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), beta=1.0)
    assert losses.tolist() == pytest.approx([0.69314718, 0.31326169, 0.12692801], abs=5e-9)


def test_beta_scales_the_margin():
    """At beta 0.1 the margin 10 is the margin 1 of beta 1: 0.31326169."""
    losses = compute_pairwise_losses(torch.tensor([10.0], dtype=torch.float64), beta=0.1)
    assert losses.tolist() == pytest.approx([0.31326169], abs=5e-9)


def test_label_smoothing_mixes_in_the_opposite_label():
    """Margin 1, eps 0.1: 0.9 x 0.31326169 + 0.1 x 1.31326169 = 0.41326169, as -log sigmoid(-1) is 1 more.

    Its minimum is where sigmoid(beta h) = 1 - eps: h = ln 9 at eps 0.1 and beta 1.
    """
    margins = torch.tensor([1.0, math.log(9)], dtype=torch.float64, requires_grad=True)
    losses = compute_pairwise_losses(margins, beta=1.0, label_smoothing=0.1)
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(0.41326169, abs=5e-9)
    assert margins.grad[1].item() == pytest.approx(0.0, abs=1e-12)


def test_ipo_is_the_squared_distance_to_half_inverse_beta():
    """(h - 1 / (2 beta))^2 at beta 0.1, target 5: h = -1, 0, 2, 5 give 36, 25, 9, 0."""
    losses = compute_pairwise_losses(torch.tensor([-1.0, 0.0, 2.0, 5.0]), beta=0.1, kind="ipo")
    assert losses.tolist() == pytest.approx([36.0, 25.0, 9.0, 0.0], abs=1e-5)


def test_hinge_is_linear_up_to_inverse_beta():
    """max(0, 1 - 0.5 h): h = -2, 0, 1, 2, 3 give 2, 1, 0.5, 0, 0."""
    losses = compute_pairwise_losses(torch.tensor([-2.0, 0.0, 1.0, 2.0, 3.0]), beta=0.5, kind="hinge")
    assert losses.tolist() == pytest.approx([2.0, 1.0, 0.5, 0.0, 0.0])


def test_robust_of_margin_1():
    """eps 0.1: (0.9 x 0.31326169 - 0.1 x 1.31326169) / 0.8 = 0.18826169."""
    losses = compute_pairwise_losses(
        torch.tensor([1.0], dtype=torch.float64), beta=1.0, kind="robust", label_smoothing=0.1
    )
    assert losses.item() == pytest.approx(0.18826169, abs=5e-9)


def test_robust_loss_is_unbiased_under_flipped_labels():
    """(1 - eps) l(h) + eps l(-h) is the plain loss of the true label."""
    margins, eps = torch.linspace(-3, 3, 7, dtype=torch.float64), 0.2
    settings = {"beta": 0.7, "kind": "robust", "label_smoothing": eps}
    kept, flipped = (compute_pairwise_losses(h, **settings) for h in (margins, -margins))
    expected = [math.log1p(math.exp(-0.7 * h)) for h in margins.tolist()]
    assert ((1 - eps) * kept + eps * flipped).tolist() == pytest.approx(expected)


def test_sigmoid_is_finite_at_extreme_margins():
    """-log sigmoid(-1e4) is 1e4, not infinity; its slope there is -beta."""
    margins = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = compute_pairwise_losses(margins, beta=1.0)
    losses.sum().backward()
    assert losses.tolist() == [1e4, 0.0]
    assert margins.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("ipo", 0.0), ("hinge", 0.0)]
)
def test_pairwise_gradient_is_right(kind, label_smoothing):
    margins = torch.linspace(-3.1, 3.1, 7, dtype=torch.float64, requires_grad=True)  # not at the kink of hinge, 2
    assert torch.autograd.gradcheck(
        lambda h: compute_pairwise_losses(h, beta=0.5, kind=kind, label_smoothing=label_smoothing), margins
    )


def test_every_kind_is_one_value_a_row_that_falls_from_margin_zero():
    for kind in PAIRWISE_LOSSES:
        margins = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
        losses = compute_pairwise_losses(margins, beta=0.1, kind=kind)
        losses.sum().backward()
        assert losses.shape == (3,), kind
        assert (margins.grad < 0).all(), kind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"beta": -1.0}, "beta: got -1.0"),
        ({"beta": float("nan")}, "beta: got nan"),
        ({"beta": 1.0, "kind": "hinged"}, "kind: got 'hinged', expected one of sigmoid, robust, ipo, hinge"),
        ({"beta": 1.0, "label_smoothing": 0.5}, "label_smoothing: got 0.5"),
        ({"beta": 1.0, "label_smoothing": -0.1}, "label_smoothing: got -0.1"),
        ({"beta": 1.0, "kind": "ipo", "label_smoothing": 0.1}, "label_smoothing: got 0.1 with kind 'ipo'"),
        ({"beta": 1.0, "kind": "hinge", "label_smoothing": 0.1}, "label_smoothing: got 0.1 with kind 'hinge'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        compute_pairwise_losses(torch.zeros(2), **settings)
