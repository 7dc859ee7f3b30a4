"""New users: a state from a few judgments, by MAP under the trained users' prior, with shared weights frozen.

The prior is a mixture of equal parts: a new user is like one of the trained users (or the generic one), or the state is
drawn from the Gaussian of the trained users' states; with a pool of pairs, a smaller part has the opposite taste of one
of them. Where one of these states explains the judgments it is taken as it is; elsewhere the Gaussian's mode is found
by Gauss-Newton steps (in each, the margins are linear in the state and what remains is Gaussian-process classification
of as many numbers as there are judgments), and the explanation with more evidence wins, unless it is unlikely and does
worse than the generic state. What is not known of the state is how far the other explanations are from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf.adapt.feedback import make_judgments
from prlhf.adapt.laplace import Laplace, fit_margins
from prlhf.adapt.margins import Judgment, Margins
from prlhf.adapt.opposite import LOG_PRIOR, wanted_opposites, with_opposites
from prlhf.adapt.population import GaussianPrior, Population, make_population
from prlhf.data.records import JudgedRow, PreferenceRow
from prlhf.data.user_index import GENERIC_USER_ID
from prlhf.models.personalized import PersonalizedModel

MAX_STEPS = 12
USERS_AT_ONCE = 32  # whose slopes are in memory
TOLERANCE = 0.01  # nats of log posterior
SHRINK = (1.0, 0.5, 0.25, 0.125)  # of a Gauss-Newton step that does not improve the posterior
LIKELY = 0.5  # a state that is less so has to do as well as the generic one on judgments left out
EXPLAINED = -0.35  # nats a judgment; a known state that does this well leaves a Gaussian nothing to gain


@dataclass(frozen=True)
class FittedUser:
    """The state of a new user.

    Args:
        state: the shape of a row of the user model's table, float32.
        stdev: the same shape: root mean square distance of each number from the state's, over all explanations by their
            posterior probabilities (known states, opposites, and the Gaussian where no known state explains the
            judgments).
        uncertainty: root mean square of `stdev`, as a multiple of that of somebody who has judged nothing; 0 is none.
        known: index of the trained user whose state it is, 0 for the generic one; None: a state of its own.
        opposite: the state is that of a taste opposite to `known`'s.
        probability: of this explanation against the others, 1 without judgments.
        num_judgments: what it was fitted on.
        leave_one_out: share of the judgments answered right by the fit without them (Laplace approximation), of the
            generic state where it was taken for doing better; None without judgments.
        held_out: share of the held-out judgments answered right; None without any.
    """

    state: Tensor
    stdev: Tensor
    uncertainty: float
    known: int | None
    probability: float
    num_judgments: int
    leave_one_out: float | None
    held_out: float | None = None
    opposite: bool = False


class _Own(NamedTuple):
    """A user's state of their own: the Gaussian's mode (S,), its stdev (S,), evidence and left-out margins (N,)."""

    state: Tensor
    stdev: Tensor
    evidence: Tensor
    left_out_margins: Tensor


def fit_user(
    model: PersonalizedModel,
    rows: Sequence[JudgedRow],
    *,
    held_out: Sequence[JudgedRow] = (),
    pool: Sequence[PreferenceRow] = (),
    beta: float,
    per_token: bool = False,
    max_tokens: int = 1024,
    max_prompt_tokens: int = 512,
    with_user_text: bool = True,
) -> FittedUser:
    """The state of one new user from their judgments; see `fit_judgments`.

    Args:
        rows: pairs and thumbs of the user; none gives the generic state exactly.
        pool: pairs that the user need not have judged; see `fit_judgments`.
        max_tokens, max_prompt_tokens: as in the run's data section.
        with_user_text: whether user texts stand in front of prompts.
    Raises: DataError: a row that cannot be used. ValueError: the user model has no rows to fit (encoders read).
    """
    limits: dict[str, Any] = {
        "max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens, "with_user_text": with_user_text
    }
    judgments, to_measure, unjudged = (make_judgments(model, part, **limits) for part in (rows, held_out, pool))
    return fit_judgments(model, [judgments], [to_measure], pool=unjudged, beta=beta, per_token=per_token)[0]


def fit_judgments(
    model: PersonalizedModel,
    judgments: Sequence[Sequence[Judgment]],
    held_out: Sequence[Sequence[Judgment]] = (),
    *,
    pool: Sequence[Judgment] = (),
    beta: float,
    per_token: bool = False,
) -> list[FittedUser]:
    """States of U new users, each from its own judgments, independent of each other.

    What recurs is computed once: a judgment of several users under each known state.

    Args:
        judgments: of each user; none gives the generic state exactly.
        held_out: of each user, to measure on; nobody's by default.
        pool: some hundreds of pairs; which of the two is called chosen does not matter. From them it is learned what
            the opposite of a known taste is, where a user's judgments ask for it. Without them nobody is an opposite.
        beta: inverse temperature of a judgment: the run's loss.beta, 1 for a reward model.
        per_token: the model was trained without reference, on mean log-probs per token.
    Raises: ValueError: the user model has no rows to fit.
    """
    assert model.user_encoder is not None
    population = make_population(model.user_encoder)
    with model.evaluating():
        data = _Batch(model, judgments, per_token=per_token)
        margins = data.margins.table(population.states)
        log_prior = torch.zeros(len(judgments), len(population.states), dtype=torch.float64)
        if pool and len(margins):
            wanted = wanted_opposites(*(data.log_likelihood(sign * margins, beta).sum(1) for sign in (1, -1)))
            places = sorted(set(wanted[wanted >= 0].tolist()))
            if places:
                options: dict[str, Any] = {"beta": beta, "per_token": per_token}
                population = with_opposites(model, population, places, pool, **options)
                opposed = data.margins.table(population.states[population.num_known :])
                margins = torch.cat([margins, opposed], dim=1)
                # Whoever else is fitted in this call, a user may have the opposite that they want, and no other.
                theirs = wanted[:, None] == torch.tensor(places)
                log_prior = torch.cat([log_prior, torch.where(theirs, LOG_PRIOR, -math.inf)], dim=1)
        return _with_held_out(_fit(data, population, margins, log_prior, beta), model, held_out, per_token)


class _Batch:
    """Judgments of U users as places among the distinct ones, padded to the most that one has."""

    def __init__(self, model: PersonalizedModel, judgments: Sequence[Sequence[Judgment]], *, per_token: bool) -> None:
        places: dict[Judgment, int] = {}
        of_user = [[places.setdefault(judgment, len(places)) for judgment in own] for own in judgments]
        most = max(map(len, of_user), default=0)
        self.margins = Margins(model, list(places), per_token=per_token)
        self.shape = self.margins.user_model.generic_state.shape
        self.places = torch.tensor([own + [0] * (most - len(own)) for own in of_user], dtype=torch.int64)
        self.counts = torch.tensor([len(own) for own in of_user], dtype=torch.int64)
        self.mask = torch.arange(most) < self.counts[:, None]

    def log_likelihood(self, margins: Tensor, beta: float) -> Tensor:
        """Of each user's judgments, (U, N, A), from the margins (D, A) of the distinct ones; 0 on padding."""
        return F.logsigmoid(beta * margins[self.places]) * self.mask[:, :, None]

    def slopes(self, users: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Margins (M, N) and slopes (M, N, S) of some users' judgments under a state each (M, S); 0 on padding."""
        mask = self.mask[users]
        values, slopes = self.margins.slopes(
            self.places[users][mask].tolist(), states.repeat_interleave(mask.sum(1), dim=0)
        )
        margins = torch.zeros(mask.shape, dtype=torch.float64)
        margins[mask] = values
        all_slopes = torch.zeros(*mask.shape, states.shape[1], dtype=torch.float64)
        all_slopes[mask] = slopes
        return margins, all_slopes


def _fit(
    data: _Batch, population: Population, table: Tensor, log_prior: Tensor, beta: float
) -> list[FittedUser]:
    """The fits of all users.

    Args:
        table: (D, A) margins of the distinct judgments under the population's states.
        log_prior: (U, A) of each state for each user, up to a constant.
    """
    num_users, most = data.mask.shape
    if not most:
        return [_generic(data, population) for _ in range(num_users)]
    states = population.states
    margins, loglik = table[data.places], data.log_likelihood(table, beta)  # (U, N, A)
    possible = torch.where(log_prior.isinf(), log_prior, loglik.sum(1))
    unexplained = (possible.max(1).values < EXPLAINED * data.counts).nonzero()[:, 0]
    own: dict[int, _Own] = {}
    for users in unexplained.split(USERS_AT_ONCE) if len(unexplained) else ():
        objective = population.prior.penalty(states) - possible[users]
        fits = _fit_gaussian(data, population.prior, users, states[objective.argmin(1)], beta)
        own.update(zip(users.tolist(), fits, strict=True))
    fitted = []
    for user, count in enumerate(data.counts.tolist()):
        if count:
            known = margins[user, :count], loglik[user, :count], log_prior[user]
            fitted.append(_choose(data, population, *known, own.get(user)))
        else:
            fitted.append(_generic(data, population))
    return fitted


def _choose(
    data: _Batch, population: Population, margins: Tensor, loglik: Tensor, log_prior: Tensor, own: _Own | None
) -> FittedUser:
    """The explanation with more evidence, or the generic one where that is unlikely and does worse on what is left out.

    Of each judgment left out: as the explanation with more evidence from the others says.

    Args:
        margins, loglik: (n, A) of the user's judgments under the population's states.
        log_prior: (A,) of these.
    """
    evidence, states = loglik.sum(0) + log_prior, population.states
    without = evidence - loglik
    if own is not None:
        alone = own.left_out_margins[: len(margins)]
        evidence, states = torch.cat([evidence, own.evidence[None]]), torch.cat([states, own.state[None]])
        margins = torch.cat([margins, alone[:, None]], dim=1)
        without = torch.cat([without, (own.evidence - F.logsigmoid(alone))[:, None]], dim=1)
    right = margins > 0
    rate = float(right.gather(1, without.argmax(1)[:, None]).double().mean())
    best, weights = int(evidence.argmax()), evidence.softmax(0)
    generic_rate = float(right[:, 0].double().mean())
    if weights[best] < LIKELY and rate < generic_rate:
        best, rate = 0, generic_rate
    variance = weights @ (states - states[best]) ** 2
    if own is not None:
        variance += weights[-1] * own.stdev**2
    is_known = best < len(population.states)
    return FittedUser(
        states[best].float().view(data.shape),
        variance.sqrt().float().view(data.shape),
        float((variance.mean() / _unjudged_variance(population).mean()).sqrt()),
        population.ids[best] if is_known else None,
        float(weights[best]),
        len(loglik),
        rate,
        opposite=is_known and best >= population.num_known,
    )


def _generic(data: _Batch, population: Population) -> FittedUser:
    state, stdev = population.states[0].float(), _unjudged_variance(population).sqrt().float()
    return FittedUser(state.view(data.shape), stdev.view(data.shape), 1.0, GENERIC_USER_ID, 1.0, 0, None)


def _unjudged_variance(population: Population) -> Tensor:
    """(S,) mean square distance from the generic state before any judgment: all explanations are equally likely."""
    prior, known = population.prior, population.states[: population.num_known]
    centers = torch.cat([known, prior.mean[None]])
    return ((centers - known[0]) ** 2).mean(0) + prior.stdev() ** 2 / len(centers)


def _fit_gaussian(data: _Batch, prior: GaussianPrior, users: Tensor, states: Tensor, beta: float) -> list[_Own]:
    """Gauss-Newton steps from the given states (M, S), each user until the posterior gains no more."""
    mask = data.mask[users]
    margins, slopes = data.slopes(users, states)
    objective = _objective(margins, states, mask, prior, beta)
    active = torch.ones(len(users), dtype=torch.bool)
    for _ in range(MAX_STEPS):
        posterior, pulls = _linear_posterior(margins, slopes, states, mask, prior, beta)
        target = prior.mean + torch.einsum("uns,un->us", pulls, posterior.coefficients)
        moved = torch.zeros_like(active)
        for size in SHRINK:
            waiting = (active & ~moved).nonzero()[:, 0]
            if not len(waiting):
                break
            candidates = states[waiting] + size * (target[waiting] - states[waiting])
            new_margins, new_slopes = data.slopes(users[waiting], candidates)
            new = _objective(new_margins, candidates, mask[waiting], prior, beta)
            better = new < objective[waiting]
            kept = waiting[better]
            active[kept] = objective[kept] - new[better] > TOLERANCE
            states[kept], objective[kept] = candidates[better], new[better]
            margins[kept], slopes[kept] = new_margins[better], new_slopes[better]
            moved[kept] = True
        active &= moved
        if not active.any():
            break
    posterior, pulls = _linear_posterior(margins, slopes, states, mask, prior, beta)
    variance = prior.stdev() ** 2 - posterior.explained_variance(pulls)
    stdev = variance.clamp(min=0).sqrt()
    left_out = beta * posterior.left_out_margins
    return [_Own(*own) for own in zip(states, stdev, posterior.log_evidence, left_out, strict=True)]


def _objective(margins: Tensor, states: Tensor, mask: Tensor, prior: GaussianPrior, beta: float) -> Tensor:
    """Minus the log posterior density of each user's state, up to a constant: (M,)."""
    return prior.penalty(states) - (F.logsigmoid(beta * margins) * mask).sum(1)


def _linear_posterior(
    margins: Tensor, slopes: Tensor, states: Tensor, mask: Tensor, prior: GaussianPrior, beta: float
) -> tuple[Laplace, Tensor]:
    """The posterior if margins were linear in the state, and the covariance of the state with each margin (M, N, S)."""
    pulls = prior.times_covariance(slopes)
    kernel = torch.einsum("uis,ujs->uij", pulls, slopes)
    at_mean = margins + torch.einsum("uns,us->un", slopes, prior.mean - states)
    return fit_margins(at_mean, kernel, mask, beta=beta), pulls


def _with_held_out(
    fitted: list[FittedUser], model: PersonalizedModel, held_out: Sequence[Sequence[Judgment]], per_token: bool
) -> list[FittedUser]:
    if not any(held_out):
        return fitted
    data = _Batch(model, held_out, per_token=per_token)
    measured = []
    for user, places, mask in zip(fitted, data.places, data.mask, strict=True):
        state = user.state.flatten().expand(int(mask.sum()), -1)
        right = data.margins.values(places[mask].tolist(), state) > 0
        measured.append(replace(user, held_out=float(right.double().mean()) if len(right) else None))
    return measured
