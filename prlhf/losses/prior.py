"""A Gaussian prior on what sets a user apart from the generic one."""

from __future__ import annotations

from torch import Tensor


def gaussian_prior(deviations: Tensor, rows_of_user: Tensor, *, precision: float) -> Tensor:
    """Each row's share of the prior's negative log density, up to a constant.

    share = precision / (2 n_u) |o_u|^2; the n_u rows of a user add up to precision / 2 |o_u|^2, so the whole data set
    gives the MAP estimate, and a user with few rows stays nearer to the generic one.

    Args:
        deviations: (B, ...) o_u of each row's user, 0 for the generic user.
        rows_of_user: (B,) training rows of each row's user, at least 1.
        precision: one over the prior's variance, >= 0.
    Returns: (B,).
    Raises: ValueError: shapes differ, or a negative precision.
    """
    if rows_of_user.shape != deviations.shape[:1]:
        raise ValueError(f"rows_of_user: got {tuple(rows_of_user.shape)}, expected {tuple(deviations.shape[:1])}")
    if precision < 0:
        raise ValueError(f"precision: got {precision}, expected 0 or more")
    return precision / 2 * deviations.square().flatten(1).sum(dim=1) / rows_of_user
