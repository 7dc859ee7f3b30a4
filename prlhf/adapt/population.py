"""What the trained users say about the next one: a Gaussian over states, and known states to start from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prlhf.data.user_index import GENERIC_USER_ID
from prlhf.usermodel import UserModel
from prlhf.usermodel.base import gather_rows

MAX_KNOWN = 32
MAX_USERS = 1000  # trained users that the Gaussian is made from
MAX_LOOKED_AT = 16 * MAX_USERS  # until so many are found: of a large table many were never trained
REST_SHARE = 0.5  # far less keeps new tastes in the span of the known ones, which holds no more tastes than those


@dataclass(frozen=True)
class GaussianPrior:
    """N(mean, Q diag(variances) Q^T + rest I) over flat states of S numbers.

    Args:
        mean: (S,).
        basis: (S, R) Q, orthonormal: the directions in which the trained users differ.
        variances: (R,) along Q, beyond `rest`.
        rest: variance in every direction, > 0.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    rest: float

    def stdev(self) -> Tensor:
        """(S,) of each number."""
        return (self.rest + (self.basis**2) @ self.variances).sqrt()

    def times_covariance(self, vectors: Tensor) -> Tensor:
        """(..., S) times the covariance."""
        return self.rest * vectors + ((vectors @ self.basis) * self.variances) @ self.basis.T

    def penalty(self, states: Tensor) -> Tensor:
        """Half the squared Mahalanobis distance of states (..., S) from the mean."""
        deviation = states - self.mean
        along = deviation @ self.basis
        across = (deviation**2).sum(-1) - (along**2).sum(-1)
        return 0.5 * (across / self.rest + (along**2 / (self.variances + self.rest)).sum(-1))

    def slope(self, state: Tensor) -> Tensor:
        """Gradient of the penalty at a state (S,)."""
        deviation = state - self.mean
        along = deviation @ self.basis
        across = deviation - self.basis @ along
        return across / self.rest + self.basis @ (along / (self.variances + self.rest))


def make_prior(states: Tensor, generic: Tensor, *, rest_share: float) -> GaussianPrior:
    """Mean and shrunk covariance of the trained users' states.

    Args:
        states: (U, S) of the trained users.
        generic: (S,), which counts as one more.
        rest_share: the variance in every direction, as a share of the trained users' variance in all directions;
            keeps the prior proper where there are fewer users than numbers in a state.
    """
    everyone = torch.cat([generic[None], states]).double()
    mean = everyone.mean(dim=0)
    deviations = everyone - mean
    squares, directions = _principal_axes(deviations)
    variances = squares / max(1, len(everyone) - 1)
    kept = variances > 1e-9 * variances.max().clamp(min=1e-12)
    total = float(variances[kept].sum()) or 1.0
    return GaussianPrior(mean, directions[:, kept], variances[kept], rest_share * total)


def _principal_axes(deviations: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values (R,) of (U, S), and right singular vectors (S, R) of those that are not 0.

    By the smaller of the two Gram matrices: R = min(U, S).
    """
    if len(deviations) >= deviations.shape[1]:
        squares, directions = torch.linalg.eigh(deviations.T @ deviations)
        return squares, directions
    squares, combinations = torch.linalg.eigh(deviations @ deviations.T)
    return squares, deviations.T @ combinations / squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


@dataclass(frozen=True)
class Population:
    """What a new user may be: one of A states, or a draw from the Gaussian.

    Args:
        states: (A, S) float64 of trained users, the generic one first, and of opposites of some of them.
        ids: user index of each, 0 for the generic one; of an opposite, that of whom it is the opposite of.
        num_known: how many are no opposites; they come first.
    """

    states: Tensor
    ids: tuple[int, ...]
    prior: GaussianPrior
    num_known: int


def make_population(user_model: UserModel, *, rest_share: float = REST_SHARE) -> Population:
    """The population of a trained user model; of many users the Gaussian knows a sample, the known states a few of it.

    Users with one and the same state count once, and those with the generic one not at all: who was found to be like a
    known user has that user's row. Of more than MAX_USERS users as many are drawn, always the same; no other row is
    read.

    Raises: ValueError: a model without rows of users.
    """
    generic = user_model.generic_state.detach().flatten().double().cpu()
    rows, users = _sample(user_model, generic)
    picked = _spread(rows, MAX_KNOWN)
    states = torch.cat([generic[None], rows[picked]])
    ids = (GENERIC_USER_ID, *(users[i] for i in picked))
    return Population(states, ids, make_prior(rows, generic, rest_share=rest_share), len(states))


@torch.no_grad()
def _sample(user_model: UserModel, generic: Tensor) -> tuple[Tensor, list[int]]:
    """Different states (N, S) of at most MAX_USERS trained users, and the users' indices, ascending."""
    table, count = user_model.table, user_model.num_users
    order = np.arange(count)
    if count > MAX_USERS:
        order = np.random.default_rng(0).choice(count, min(count, MAX_LOOKED_AT), replace=False)
    seen, found = {generic.numpy().tobytes()}, dict[int, Tensor]()
    for start in range(0, len(order), MAX_USERS):
        part = torch.from_numpy(order[start : start + MAX_USERS])
        rows = gather_rows(table, (part + len(table) - count).to(table.device)).flatten(1).double().cpu()
        for user, row in zip((part + 1).tolist(), rows, strict=True):
            state = row.numpy().tobytes()
            if state not in seen and len(found) < MAX_USERS:
                seen.add(state)
                found[user] = row
        if len(found) == MAX_USERS:
            break
    users = sorted(found)
    return torch.stack([found[user] for user in users]) if users else generic.new_zeros(0, len(generic)), users


def _spread(rows: Tensor, most: int) -> list[int]:
    """Up to `most` rows, each the one farthest from those before it, from the one farthest from the mean on."""
    if len(rows) <= most:
        return list(range(len(rows)))
    distances = (rows - rows.mean(0)).norm(dim=1)
    picked: list[int] = []
    for _ in range(most):
        picked.append(int(distances.argmax()))
        to_last = (rows - rows[picked[-1]]).norm(dim=1)
        distances = to_last if len(picked) == 1 else torch.minimum(distances, to_last)
    return picked
