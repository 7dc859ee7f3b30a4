"""Gaussian-process classification of a few judgments, for many users at once: pure maths on small matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_ITERATIONS = 50
TOLERANCE = 1e-8  # nats
STEPS = tuple(0.5**k for k in range(8))


@dataclass(frozen=True)
class Laplace:
    """The posterior of U users' margins, as a Gaussian around its mode.

    Args:
        coefficients: (U, N) a; the mode is the prior's mean plus the covariance with the judgments times a.
        margins: (U, N) at the mode.
        whitener: (U, N, N) L^-1 W^1/2 with L L^T = I + W^1/2 K W^1/2 and W the curvature of the log-likelihood.
        log_evidence: (U,) nats.
        left_out_margins: (U, N) of each judgment, had it not been heard.
    """

    coefficients: Tensor
    margins: Tensor
    whitener: Tensor
    log_evidence: Tensor
    left_out_margins: Tensor

    def explained_variance(self, pulls: Tensor) -> Tensor:
        """What the judgments take off the variance of S numbers (U, S), given their covariance with each margin.

        Args:
            pulls: (U, N, S).
        """
        return ((self.whitener @ pulls) ** 2).sum(1)


def fit_margins(prior_margins: Tensor, kernel: Tensor, mask: Tensor, *, beta: float) -> Laplace:
    """Mode and evidence of margins m ~ N(prior_margins, kernel) under judgments of likelihood sigmoid(beta m).

    Args:
        prior_margins: (U, N) float64.
        kernel: (U, N, N) float64, positive semi-definite.
        mask: (U, N) bool, false on padding.
        beta: inverse temperature of a judgment, > 0.
    Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, algorithms 3.1 and (left out) 5.1.
    """
    kernel = kernel * (mask[:, :, None] & mask[:, None, :])
    a = torch.zeros_like(prior_margins)

    def loss(candidate: Tensor) -> Tensor:
        spread = torch.einsum("uij,...uj->...ui", kernel, candidate)
        likelihood = (F.logsigmoid(beta * (prior_margins + spread)) * mask).sum(-1)
        return 0.5 * (candidate * spread).sum(-1) - likelihood

    best = loss(a)
    for _ in range(MAX_ITERATIONS):
        step = _newton(a, prior_margins, kernel, mask, beta) - a
        candidates = torch.stack([a + size * step for size in STEPS])
        losses, choice = loss(candidates).min(dim=0)
        better = losses < best
        gain = (best - losses).clamp(min=0).max()
        a = torch.where(better[:, None], candidates[choice, torch.arange(len(a))], a)
        best = torch.minimum(best, losses)
        if gain < TOLERANCE:
            break
    return _finish(a, prior_margins, kernel, mask, beta, best)


def _newton(a: Tensor, prior_margins: Tensor, kernel: Tensor, mask: Tensor, beta: float) -> Tensor:
    margins = prior_margins + torch.einsum("uij,uj->ui", kernel, a)
    slope, weights = _derivatives(margins, mask, beta)
    b = weights * (margins - prior_margins) + slope
    root = weights.sqrt()
    inner = root * torch.einsum("uij,uj->ui", kernel, b)
    solved = torch.cholesky_solve(inner[..., None], _cholesky(kernel, root))[..., 0]
    return b - root * solved


def _derivatives(margins: Tensor, mask: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """First derivative of the log-likelihood of each judgment in its margin, and minus the second."""
    wrong = torch.sigmoid(-beta * margins)
    return beta * wrong * mask, beta**2 * wrong * (1 - wrong) * mask


def _cholesky(kernel: Tensor, root: Tensor) -> Tensor:
    """Of I + W^1/2 K W^1/2."""
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    return torch.linalg.cholesky(identity + root[:, :, None] * kernel * root[:, None, :])


def _finish(a: Tensor, prior_margins: Tensor, kernel: Tensor, mask: Tensor, beta: float, loss: Tensor) -> Laplace:
    margins = prior_margins + torch.einsum("uij,uj->ui", kernel, a)
    slope, weights = _derivatives(margins, mask, beta)
    root = weights.sqrt()
    factor = _cholesky(kernel, root)
    log_evidence = -loss - factor.diagonal(dim1=1, dim2=2).log().sum(-1)
    whitener = torch.linalg.solve_triangular(factor, torch.diag_embed(root), upper=False)
    variance = kernel.diagonal(dim1=1, dim2=2) - ((whitener @ kernel) ** 2).sum(1)
    left_out = margins - slope * variance / (1 - weights * variance)
    return Laplace(a, margins, whitener, log_evidence, left_out)
