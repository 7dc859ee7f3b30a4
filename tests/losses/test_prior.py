"""gaussian_prior: a row's share of precision / 2 |o_u|^2."""

from __future__ import annotations

import pytest
import torch

from prlhf.losses import gaussian_prior

DEVIATIONS = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])


def test_shares_of_users_with_5_and_1_rows():
    """|o|^2 is 25, 4 and 0: 0.6 / 2 x 25 / 5 = 1.5, 0.6 / 2 x 4 / 1 = 1.2, 0."""
    shares = gaussian_prior(DEVIATIONS, torch.tensor([5, 1, 1]), precision=0.6)
    assert shares.tolist() == pytest.approx([1.5, 1.2, 0.0])


def test_the_rows_of_a_user_add_up_to_the_negative_log_density():
    """-log N(o; 0, I / precision) without its constant, by torch's own normal distribution."""
    rows = DEVIATIONS[:1].expand(7, 2, 2)
    total = gaussian_prior(rows, torch.full((7,), 7), precision=4.0).sum()
    normal = torch.distributions.Normal(0.0, 0.5)
    assert total.item() == pytest.approx(float((normal.log_prob(torch.zeros(2, 2)) - normal.log_prob(rows[0])).sum()))


def test_gradient_is_precision_times_the_deviation_over_the_rows():
    deviations = DEVIATIONS.double().requires_grad_()
    gaussian_prior(deviations, torch.tensor([5, 2, 1]), precision=0.6).sum().backward()
    expected = 0.6 * DEVIATIONS.double() / torch.tensor([5.0, 2.0, 1.0])[:, None, None]
    torch.testing.assert_close(deviations.grad, expected.double())
    assert torch.autograd.gradcheck(
        lambda x: gaussian_prior(x, torch.tensor([5, 2, 1]), precision=0.6), (DEVIATIONS.double().requires_grad_(),)
    )


def test_other_shapes_and_a_negative_precision_are_refused():
    with pytest.raises(ValueError, match="rows_of_user: got \\(1,\\), expected \\(3,\\)"):
        gaussian_prior(DEVIATIONS, torch.tensor([1]), precision=1.0)
    with pytest.raises(ValueError, match="precision: got -1"):
        gaussian_prior(DEVIATIONS, torch.tensor([1, 1, 1]), precision=-1.0)
