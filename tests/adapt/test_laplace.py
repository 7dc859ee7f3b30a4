"""Gaussian-process classification against a root found by bisection and fits without a judgment."""

from __future__ import annotations

import math

import pytest
import torch

from prlhf.adapt.laplace import fit_margins


def _root(prior: float, variance: float, beta: float) -> float:
    """a with a = beta sigmoid(-beta (prior + variance a)), by bisection."""
    low, high = 0.0, beta
    for _ in range(100):
        middle = (low + high) / 2
        if middle < beta / (1 + math.exp(beta * (prior + variance * middle))):
            low = middle
        else:
            high = middle
    return low


@pytest.mark.parametrize(("prior", "variance", "beta"), [(0.0, 1.0, 1.0), (-40.0, 900.0, 0.1), (3.0, 1e-6, 2.0)])
def test_the_mode_of_one_judgment_solves_its_equation(prior: float, variance: float, beta: float) -> None:
    fitted = fit_margins(
        torch.tensor([[prior]]).double(), torch.tensor([[[variance]]]).double(), torch.tensor([[True]]), beta=beta
    )
    expected = _root(prior, variance, beta)
    assert fitted.coefficients.item() == pytest.approx(expected, rel=1e-6)
    margin = prior + variance * expected
    chance = 1 / (1 + math.exp(-beta * margin))
    curvature = beta**2 * chance * (1 - chance)
    evidence = math.log(chance) - variance * expected**2 / 2 - math.log(1 + variance * curvature) / 2
    assert fitted.log_evidence.item() == pytest.approx(evidence, rel=1e-6)
    assert fitted.left_out_margins.item() == pytest.approx(prior, abs=0.25 * abs(prior) + 0.7)  # Laplace's own error


def test_a_left_out_margin_is_near_that_of_the_fit_without_the_judgment() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(1, 6, 9, generator=generator).double()
    kernel, prior = factor @ factor.mT / 9, torch.randn(1, 6, generator=generator).double()
    everyone = torch.ones(1, 6, dtype=torch.bool)
    fitted = fit_margins(prior, kernel, everyone, beta=1.0)
    for i in range(6):
        others = everyone.clone()
        others[0, i] = False
        without = fit_margins(prior, kernel, others, beta=1.0)
        expected = prior[0, i] + kernel[0, i] @ without.coefficients[0]
        assert fitted.left_out_margins[0, i].item() == pytest.approx(expected.item(), abs=0.05)


def test_padding_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(1, 3, 5, generator=generator).double()
    prior = torch.randn(1, 3, generator=generator).double()
    mask = torch.tensor([[True, True, False]])
    padded = fit_margins(prior, factor @ factor.mT, mask, beta=1.0)
    plain = fit_margins(prior[:, :2], (factor @ factor.mT)[:, :2, :2], mask[:, :2], beta=1.0)
    torch.testing.assert_close(padded.coefficients[:, :2], plain.coefficients)
    torch.testing.assert_close(padded.log_evidence, plain.log_evidence)
    assert padded.coefficients[0, 2] == 0
