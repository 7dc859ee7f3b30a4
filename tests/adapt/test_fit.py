"""New users of a tiny policy: exact where it can be, and against independent objectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from prlhf.adapt import Judgment, fit_judgments
from prlhf.adapt import fit as fit_module
from prlhf.adapt import population as population_module
from prlhf.adapt.feedback import make_judgments
from prlhf.adapt.margins import Margins
from prlhf.adapt.new_users import likelihood
from prlhf.adapt.population import _spread, make_population, make_prior
from prlhf.config import config_from_dict
from prlhf.data.records import LabelledRow
from prlhf.errors import DataError
from prlhf.models.packing import Packing, set_up_packing_
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy
from prlhf.usermodel import ClusterUserModel, IndividualUserModel, LowRankUserModel, UserModel
from tests.models.test_reward import reward_model
from tests.policies import NUM_USER_TOKENS, make_batch, make_row, randomize_, tiny_policy

BETA = 1.0
NUM_USERS = 3


def make_policy(kind: str = "individual") -> PersonalizedPolicy:
    policy = tiny_policy(num_users=NUM_USERS)
    assert policy.user_encoder is not None
    sizes = {"num_users": NUM_USERS, "num_user_tokens": NUM_USER_TOKENS, "dim": policy.user_encoder.dim}
    kinds: dict[str, UserModel] = {
        "individual": IndividualUserModel(**sizes),
        "cluster": ClusterUserModel(num_clusters=2, **sizes),
        "low_rank": LowRankUserModel(rank=2, **sizes),
    }
    policy.user_encoder = kinds[kind]
    randomize_(policy.user_encoder, scale=1.0)
    return policy


def make_judgments_of(policy: PersonalizedModel, count: int, *, first: int = 0) -> list[Judgment]:
    rows = [make_row(policy, first + i, user_id=0, lengths=(3 + i % 4, 4, 6)) for i in range(count)]  # type: ignore[arg-type]
    return [Judgment(row.prompt_ids, row.responses) for row in rows]


def as_judged_by(policy: PersonalizedPolicy, judgments: list[Judgment], user: int) -> list[Judgment]:
    """The same pairs, each with the response first that the user's own margin prefers."""
    state = make_population(policy.user_encoder).states[user]  # type: ignore[arg-type]
    margins = Margins(policy, judgments).values(range(len(judgments)), state.expand(len(judgments), -1))
    return [
        judgment if margin > 0 else Judgment(judgment.prompt_ids, judgment.responses[::-1])
        for judgment, margin in zip(judgments, margins, strict=True)
    ]


@pytest.mark.parametrize("kind", ["individual", "cluster", "low_rank"])
def test_a_user_without_judgments_is_the_generic_one_bitwise(kind: str) -> None:
    policy = make_policy(kind)
    assert policy.user_encoder is not None
    fitted = fit_judgments(policy, [[]], beta=BETA)[0]
    prompt = policy.user_encoder.decode(fitted.state[None])
    assert torch.equal(prompt, policy.user_encoder(torch.tensor([0])))
    assert fitted.leave_one_out is None
    assert fitted.known == 0


@pytest.mark.parametrize("kind", ["individual", "cluster", "low_rank"])
def test_a_user_who_judges_like_a_known_one_gets_that_state(kind: str) -> None:
    """At an inverse temperature at which known users are sure of what they like."""
    policy = make_policy(kind)
    judged = as_judged_by(policy, make_judgments_of(policy, 12), 2)
    held_out = as_judged_by(policy, make_judgments_of(policy, 8, first=50), 2)
    fitted = fit_judgments(policy, [judged], [held_out], beta=30.0)[0]
    assert fitted.known == 2
    assert torch.equal(fitted.state, policy.user_encoder.table[1 + (kind == "cluster")])  # type: ignore[union-attr]
    assert fitted.held_out == 1.0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["individual", "cluster", "low_rank"])
def test_slopes_are_those_of_the_margins(kind: str, packed: bool) -> None:
    policy = make_policy(kind)
    if packed:
        packing = set_up_packing_(policy.backbone)
        assert isinstance(packing, Packing)
        policy.packing = packing
    margins = Margins(policy, [*make_judgments_of(policy, 2), Judgment((1, 5, 9), ((7, 8),), liked=False)])
    states = make_population(policy.user_encoder).states[1:4]  # type: ignore[arg-type]
    values, slopes = margins.slopes(range(3), states)
    torch.testing.assert_close(values, margins.values(range(3), states))
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction / direction.norm(dim=1, keepdim=True)
    step = 1e-2
    up, down = margins.values(range(3), states + step * direction), margins.values(range(3), states - step * direction)
    torch.testing.assert_close((up - down) / (2 * step), (slopes * direction).sum(1), rtol=2e-2, atol=5e-3)


def test_margins_are_the_policys_log_ratios() -> None:
    policy = make_policy()
    row = make_row(policy, 5, user_id=2, lengths=(4, 3, 9))
    batch = make_batch(policy, [row])
    own, reference = policy.logps(batch, torch.tensor([2])), policy.reference.sequence_logps(batch)[0]
    expected = own.chosen - own.rejected - (reference[0] - reference[1])
    state = policy.user_encoder.table[1].flatten()[None]  # type: ignore[union-attr]
    margins = Margins(policy, [Judgment(row.prompt_ids, row.responses)]).values([0], state)
    torch.testing.assert_close(margins.float(), expected.detach())


def test_margins_of_a_reward_model_are_differences_of_scores() -> None:
    model = reward_model()
    row = make_row(model, 5, user_id=2, lengths=(4, 3, 9))  # type: ignore[arg-type]
    scores = model.scores(make_batch(model, [row]), torch.tensor([2]))  # type: ignore[arg-type]
    state = model.user_encoder.table[1].flatten()[None]  # type: ignore[union-attr]
    margins = Margins(model, [Judgment(row.prompt_ids, row.responses)]).values([0], state)
    torch.testing.assert_close(margins.float(), (scores.chosen - scores.rejected).detach(), rtol=1e-4, atol=1e-5)


def test_a_thumb_is_measured_against_the_generic_user() -> None:
    policy = make_policy()
    row = make_row(policy, 5, user_id=2, lengths=(4, 3, 9))
    batch = make_batch(policy, [row])
    own, generic = policy.logps(batch, torch.tensor([2])).chosen, policy.logps(batch, torch.tensor([0])).chosen
    thumbs = [Judgment(row.prompt_ids, row.responses[:1], liked=liked) for liked in (True, False)]
    state = policy.user_encoder.table[1].flatten().expand(2, -1)  # type: ignore[union-attr]
    expected = torch.cat([own - generic, generic - own]).detach()
    torch.testing.assert_close(Margins(policy, thumbs).values([0, 1], state).float(), expected, rtol=1e-4, atol=1e-4)


def test_thumbs_on_one_prompt_are_a_pair_and_a_reward_model_takes_no_other() -> None:
    policy, model = make_policy(), reward_model()
    limits = {"max_tokens": 100, "max_prompt_tokens": 50}
    said = [("one", "yes", True), ("one", "no", False), ("two", "b", True)]
    thumbs = [LabelledRow("u", *one) for one in said]
    judgments = make_judgments(policy, thumbs, **limits)  # type: ignore[arg-type]
    assert [len(judgment.responses) for judgment in judgments] == [2, 1]
    assert judgments[1].liked
    assert len(make_judgments(model, thumbs[:2], **limits)) == 1  # type: ignore[arg-type]
    with pytest.raises(DataError, match="a thumb alone"):
        make_judgments(model, thumbs, **limits)  # type: ignore[arg-type]


def _own_state(policy: PersonalizedPolicy, judgments: list[Judgment]) -> fit_module._Own:
    population = make_population(policy.user_encoder)  # type: ignore[arg-type]
    data = fit_module._Batch(policy, [judgments], per_token=False)
    start = population.states[:1].clone()
    with policy.evaluating():
        return fit_module._fit_gaussian(data, population.prior, torch.tensor([0]), start, BETA)[0]


def test_no_small_step_improves_the_posterior_of_a_state_of_its_own() -> None:
    """The log posterior written out again, with the covariance as a dense matrix."""
    policy = make_policy()
    judgments = make_judgments_of(policy, 6)
    state = _own_state(policy, judgments).state
    prior = make_population(policy.user_encoder).prior  # type: ignore[arg-type]
    size = len(state)
    covariance = prior.rest * torch.eye(size).double() + prior.basis @ prior.variances.diag() @ prior.basis.T
    margins = Margins(policy, judgments)

    def log_posterior(states: torch.Tensor) -> torch.Tensor:
        deviation = states - prior.mean
        distance = (deviation * torch.linalg.solve(covariance, deviation.T).T).sum(1)
        rows = [row for _ in states for row in range(len(judgments))]
        values = margins.values(rows, states.repeat_interleave(len(judgments), dim=0)).view(len(states), -1)
        return F.logsigmoid(BETA * values).sum(1) - 0.5 * distance

    steps = torch.randn(24, size, generator=torch.Generator().manual_seed(3)).double() * prior.stdev() * 0.1
    tried = log_posterior(torch.cat([state[None], state + steps, state - steps]))
    assert tried[0] > tried[1:].max() - 2 * fit_module.TOLERANCE


def test_users_fitted_together_are_those_fitted_alone() -> None:
    policy = make_policy()
    judgments = make_judgments_of(policy, 9)
    of_users = [judgments[:6], [], judgments[5:6], judgments[2:]]
    together = fit_judgments(policy, of_users, beta=BETA)
    for own, expected in zip(of_users, together, strict=True):
        alone = fit_judgments(policy, [own], beta=BETA)[0]
        torch.testing.assert_close(alone.state, expected.state, rtol=1e-3, atol=1e-3)
        assert alone.known == expected.known
        assert alone.leave_one_out == expected.leave_one_out


def test_the_uncertainty_is_the_spread_of_the_explanations_around_the_state() -> None:
    """Of a user who may be like several known ones: their states, weighted by likelihood, written out."""
    policy = make_policy()
    judgments = as_judged_by(policy, make_judgments_of(policy, 4), 2)
    states = make_population(policy.user_encoder).states  # type: ignore[arg-type]
    [fitted] = fit_judgments(policy, [judgments], beta=3.0)
    loglik = F.logsigmoid(3.0 * Margins(policy, judgments).table(states)).sum(0)
    assert fitted.known == 2 and loglik.max() > fit_module.EXPLAINED * 4  # so there is no state of their own
    weights = loglik.exp() / loglik.exp().sum()
    assert fitted.probability == pytest.approx(float(weights[2])) and 0.4 < weights[2] < 0.999
    expected = sum(w * (state - states[2]) ** 2 for w, state in zip(weights, states, strict=True)) ** 0.5
    torch.testing.assert_close(fitted.stdev.flatten().double(), expected, rtol=1e-5, atol=1e-7)
    assert 0 < fitted.uncertainty < 1


def test_who_contradicts_themselves_is_not_known_for_sure() -> None:
    policy = make_policy()
    judgments = make_judgments_of(policy, 3)
    turned = [Judgment(one.prompt_ids, one.responses[::-1]) for one in judgments]
    [clear] = fit_judgments(policy, [as_judged_by(policy, make_judgments_of(policy, 12), 2)], beta=30.0)
    contradicting, unheard = fit_judgments(policy, [[*judgments, *turned], []], beta=BETA)
    assert clear.uncertainty < 0.1 < 0.3 < contradicting.uncertainty
    assert unheard.uncertainty == 1.0 and bool(unheard.stdev.all())


@pytest.mark.parametrize(("strength", "known"), [(0.1, 0), (1.0, 2)])
def test_an_unlikely_state_that_does_worse_than_the_generic_one_is_not_taken(strength: float, known: int) -> None:
    """Two judgments: user 2 and the generic one agree with both, but either alone speaks for who denies the other."""
    policy = make_policy()
    population = make_population(policy.user_encoder)  # type: ignore[arg-type]
    data = fit_module._Batch(policy, [make_judgments_of(policy, 2)], per_token=False)
    margins = strength * torch.tensor([[0.2, -9.0, 2.0, 9.0], [0.2, 9.0, 2.0, -9.0]], dtype=torch.float64)
    chosen = fit_module._choose(data, population, margins, F.logsigmoid(margins), torch.zeros(4).double(), None)
    weights = F.logsigmoid(margins).sum(0).softmax(0)
    assert (float(weights.max()) < 0.5) == (known == 0)
    assert chosen.known == known
    assert chosen.probability == pytest.approx(float(weights[known]))
    assert chosen.leave_one_out == (1.0 if known == 0 else 0.0)


def test_judgments_leave_less_uncertainty_than_the_prior() -> None:
    policy = make_policy()
    prior = make_population(policy.user_encoder).prior.stdev()  # type: ignore[arg-type]
    few, many = (_own_state(policy, make_judgments_of(policy, count)).stdev for count in (2, 8))
    assert bool((few <= prior + 1e-9).all())
    assert many.sum() < few.sum() < prior.sum()


def test_without_a_reference_margins_are_means_per_token() -> None:
    policy = make_policy()
    row = make_row(policy, 5, user_id=2, lengths=(4, 3, 9))
    own = policy.logps(make_batch(policy, [row]), torch.tensor([2]))
    lengths = [len(ids) for ids in row.responses]
    state = policy.user_encoder.table[1].flatten()[None]  # type: ignore[union-attr]
    margins = Margins(policy, [Judgment(row.prompt_ids, row.responses)], per_token=True).values([0], state)
    expected = (own.chosen / lengths[0] - own.rejected / lengths[1]).detach()
    torch.testing.assert_close(margins.float(), expected)


def test_of_many_known_states_those_farthest_apart_are_kept() -> None:
    """A corner first, then each time the row with the largest smallest distance to those before it."""
    rows = torch.tensor([[0.0, 0], [0.1, 0], [0, 0.1], [10, 0], [10, 10.5], [0, 9]]).double()
    assert sorted(_spread(rows, 4)) == [0, 3, 4, 5] or sorted(_spread(rows, 4)) == [1, 3, 4, 5]
    assert _spread(rows, 6) == [0, 1, 2, 3, 4, 5]


def test_users_with_one_state_count_once_and_those_with_the_generic_one_not_at_all() -> None:
    """As they are in a model adapted again and again: who is like a known user has that user's row."""
    policy = make_policy()
    encoder = policy.user_encoder
    assert isinstance(encoder, IndividualUserModel)
    once = make_population(encoder)
    again = IndividualUserModel(num_users=6, num_user_tokens=NUM_USER_TOKENS, dim=encoder.dim)
    with torch.no_grad():
        again.generic.copy_(encoder.generic)
        first, second, third = encoder.offsets
        again.offsets.copy_(torch.stack([first, second, first, torch.zeros_like(first), third, first]))
    twice = make_population(again)
    assert torch.equal(twice.states, once.states)
    assert twice.ids == (0, 1, 2, 5)
    torch.testing.assert_close(twice.prior.mean, once.prior.mean)


@pytest.mark.parametrize(("num_rows", "size"), [(7, 20), (30, 5), (1, 4)])
def test_the_gaussian_is_the_shrunk_covariance_of_the_states(num_rows: int, size: int) -> None:
    """Along every direction, however many states there are."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(num_rows, size, generator=generator, dtype=torch.float64)
    prior = make_prior(states, torch.zeros(size).double(), rest_share=0.5)
    everyone = torch.cat([torch.zeros(1, size).double(), states])
    covariance = everyone.T.cov()
    expected = covariance + 0.5 * covariance.trace() * torch.eye(size).double()
    torch.testing.assert_close(prior.times_covariance(torch.eye(size).double()), expected)
    torch.testing.assert_close(prior.stdev(), expected.diagonal().sqrt())
    torch.testing.assert_close(prior.basis.T @ prior.basis, torch.eye(prior.basis.shape[1]).double())


def test_of_many_users_a_sample_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always the same thousand of those who were trained; rows of no more than a few thousand users are looked at."""
    encoder = LowRankUserModel(num_users=60_000, num_user_tokens=2, dim=4, rank=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        encoder.weights[::4] = torch.randn(15_000, 3, generator=generator) + 1
    looked_at: list[int] = []
    gather = population_module.gather_rows

    def counting(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        looked_at.extend(rows.tolist())
        return gather(table, rows)

    monkeypatch.setattr(population_module, "gather_rows", counting)
    population = make_population(encoder)
    assert len(set(looked_at)) == len(looked_at) < 6_000
    assert population.num_known == 33
    for user, state in zip(population.ids[1:], population.states[1:], strict=True):
        assert (user - 1) % 4 == 0 and torch.equal(state, encoder.weights[user - 1].double())
    # The mean of 1,000 numbers of variance 1 is within 5 of its standard deviations.
    torch.testing.assert_close(population.prior.mean, torch.ones(3).double(), rtol=0, atol=5 * 1000**-0.5)
    assert torch.equal(make_population(encoder).states, population.states)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": {"beta": 0.3}}, {"beta": 0.3, "per_token": False}),
        ({"loss": {"kind": "simpo", "beta": 2.0}}, {"beta": 2.0, "per_token": True}),
        ({"method": "prm"}, {"beta": 1.0}),
    ],
)
def test_a_judgment_is_as_sure_as_in_the_runs_loss(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert likelihood(config_from_dict(settings, "a.yaml")) == expected
