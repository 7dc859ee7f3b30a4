"""What a new user may want besides: the opposite of a known taste, learned from pairs that the user need not judge.

A few trained users say little about tastes that none of them has, but much about what tastes are about: whom one of
them never agrees with wants the opposite. No state is known that says so, for where everybody agrees the shared weights
have learned it, too; but of any pair it is known how the opposite would choose, and a state can be fitted to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

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
BETAS = (0.9, 0.99)


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
    pairs = Margins(model, seen, per_token=per_token)
    fitted = [
        fit_opposite(pairs, known, population.prior, beta=beta)
        for known in pairs.table(population.states[list(places)]).T
    ]
    return replace(
        population,
        states=torch.cat([population.states, torch.stack(fitted)]),
        ids=(*population.ids, *(population.ids[place] for place in places)),
    )


def fit_opposite(pairs: Margins, known: Tensor, prior: GaussianPrior, *, beta: float) -> Tensor:
    """The state (S,) whose margins are nearest to minus those of a known state, on the pairs of which that is surest.

    Nearest in cross-entropy to answers as sure as the known user's are the other way round, under the prior, by Adam:
    the margins bend too much for steps that take them as straight to get down to many pairs.

    Args:
        known: (N,) margins of the pairs under the known state.
    """
    surest = known.abs().argsort(descending=True)[:MAX_PAIRS]
    target = torch.sigmoid(-beta * known[surest])
    state = prior.mean.clone()
    size = STEP * float(prior.variances.sum() / len(state)) ** 0.5
    optimizer = torch.optim.Adam([state], lr=size, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / NUM_STEPS)
    rng = np.random.default_rng(0)
    count = min(PAIRS_A_STEP, len(surest))
    for _ in range(NUM_STEPS):
        drawn = torch.from_numpy(rng.permutation(len(surest))[:count])
        margins, slopes = pairs.slopes(surest[drawn].tolist(), state.expand(count, -1))
        pull = beta * (torch.sigmoid(beta * margins) - target[drawn])
        state.grad = len(surest) / count * (pull @ slopes) + prior.slope(state)
        optimizer.step()
        schedule.step()
    return state.detach()
