"""What a new user may want besides: the opposite of a known taste, learned from pairs that the user need not judge.

A few trained users say little about tastes that none of them has, but much about what tastes are about: whom one of
them never agrees with wants the opposite. No state is known that says so, for where everybody agrees the shared weights
have learned it, too; but of any pair it is known how the opposite would choose, and a state can be fitted to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prlhf.adapt.margins import Judgment, Margins
from prlhf.adapt.population import GaussianPrior, Population
from prlhf.models.personalized import PersonalizedModel

LOG_PRIOR = -math.log(4)  # of an opposite against a known state: where both explain the judgments, the known one does
MAX_POOL = 384  # pairs looked at
MAX_PAIRS = 128  # of them learned from: those of which the known user is surest
NUM_STEPS = 160
PAIRS_A_STEP = 32
STEP = 0.5  # of Adam at the start, falling to 0: of the trained users' standard deviation
DECAY, SQUARE_DECAY = 0.9, 0.99


def wanted_opposites(loglik: Tensor, opposed: Tensor) -> Tensor:
    """(U,) place of the known state whose opposite explains a user better than all known states do; -1: none does.

    Args:
        loglik: (U, A) log-likelihood of each user's judgments under each known state.
        opposed: (U, A) the same under its opposite, who gives the other answer as surely.
    """
    best, places = opposed.max(dim=1)
    return torch.where(best + LOG_PRIOR > loglik.max(dim=1).values, places, -1)


def with_opposites(
    model: PersonalizedModel,
    population: Population,
    places: Sequence[int],
    pool: Sequence[Judgment],
    *,
    beta: float,
    per_token: bool,
) -> Population:
    """The population and the opposites of some of its known states.

    Args:
        pool: pairs; which of the two is called chosen does not matter. At most MAX_POOL of them are looked at.
    """
    seen = [pool[i] for i in sorted(np.random.default_rng(0).permutation(len(pool))[:MAX_POOL])]
    margins = Margins(model, seen, per_token=per_token).table(population.states[list(places)])
    fitted = []
    for known in margins.T:
        surest = known.abs().argsort(descending=True)[:MAX_PAIRS].tolist()
        pairs = Margins(model, [seen[i] for i in surest], per_token=per_token)
        fitted.append(fit_opposite(pairs, known[surest], population.prior, beta=beta))
    return population.with_opposites(places, torch.stack(fitted))


def fit_opposite(pairs: Margins, known: Tensor, prior: GaussianPrior, *, beta: float) -> Tensor:
    """The state (S,) whose margins are nearest to minus those of a known state.

    Nearest in cross-entropy to answers as sure as the known user's are the other way round, under the prior, by Adam:
    the margins bend too much for steps that take them as straight to get down to many pairs.

    Args:
        known: (N,) margins of the pairs under the known state.
    """
    target = torch.sigmoid(-beta * known)
    state = prior.mean.clone()
    size = STEP * float(prior.variances.sum() / len(state)) ** 0.5
    mean, square = torch.zeros_like(state), torch.zeros_like(state)
    rng = np.random.default_rng(0)
    count = min(PAIRS_A_STEP, len(known))
    for step in range(NUM_STEPS):
        rows = rng.permutation(len(known))[:count].tolist()
        margins, slopes = pairs.slopes(rows, state.expand(count, -1))
        pull = beta * (torch.sigmoid(beta * margins) - target[rows])
        gradient = len(known) / count * (pull @ slopes) + prior.slope(state)
        mean = DECAY * mean + (1 - DECAY) * gradient
        square = SQUARE_DECAY * square + (1 - SQUARE_DECAY) * gradient**2
        direction = (mean / (1 - DECAY ** (step + 1))) / ((square / (1 - SQUARE_DECAY ** (step + 1))).sqrt() + 1e-12)
        state = state - size * (1 - step / NUM_STEPS) * direction
    return state
