"""Opposites of known tastes: wanted where nothing known explains a user, and learned from pairs nobody judged."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from prlhf.adapt import fit_judgments, fit_user
from prlhf.adapt.feedback import make_judgments
from prlhf.adapt.new_users import likelihood
from prlhf.adapt.opposite import LOG_PRIOR, wanted_opposites
from prlhf.adapt.population import make_population
from prlhf.data.records import PreferenceRow, preference_row
from prlhf.engine.trainer import train
from prlhf.models.assemble import load_model
from prlhf.models.run_folder import resolve_checkpoint
from tests.adapt.test_fit import as_judged_by, make_judgments_of, make_policy
from tests.tiny_run import EVAL_THINGS, THINGS, Tiny, preference_record


def test_an_opposite_is_wanted_where_it_explains_more_than_every_known_state() -> None:
    margins = torch.tensor([[[3.0, 0.5]], [[-3.0, 0.5]], [[-0.1, 0.2]]], dtype=torch.float64)  # (U, N, A)
    known, opposed = (F.logsigmoid(sign * margins).sum(1) for sign in (1, -1))
    assert wanted_opposites(known, opposed).tolist() == [-1, -1, -1]  # the third: by less than opposites are rarer
    margins[1, 0, 1] = -2.5
    known, opposed = (F.logsigmoid(sign * margins).sum(1) for sign in (1, -1))
    assert float(opposed[1].max() - known[1].max()) > -LOG_PRIOR
    assert wanted_opposites(known, opposed).tolist() == [-1, 0, -1]


def test_a_few_judgments_and_a_pool_make_a_taste_that_nobody_has(tiny: Tiny, tmp_path: Path) -> None:
    """The model learned short answers and long ones, but of its users only those who like short ones are left."""
    steps = {"train__max_steps": 40, "train__batch_rows": 8, "checkpoint__every_steps": 0, "eval__generate": 0}
    config = tiny.config(loss__beta=0.3, **steps)
    train(config, tmp_path / "run")
    model = load_model(resolve_checkpoint(tmp_path / "run"))
    assert model.users is not None and model.users.user_ids == ("ann", "bob")
    with torch.no_grad():
        model.user_encoder.table[1] = model.user_encoder.table[0]  # type: ignore[union-attr]

    def rows(things: list[str], *, prefers_short: bool) -> list[PreferenceRow]:
        return [preference_row(preference_record(thing, "eve", prefers_short=prefers_short), "-") for thing in things]

    judged = rows(["a kite", "fog", "jam", "a bell", "salt", "a map", "ice", "wool"], prefers_short=False)
    held_out = rows(EVAL_THINGS, prefers_short=False)
    options = {**likelihood(config), "max_tokens": 200, "max_prompt_tokens": 64}
    fitted = fit_user(model, judged, held_out=held_out, pool=rows(THINGS, prefers_short=True), **options)
    assert (fitted.known, fitted.opposite) == (1, True)
    assert fitted.uncertainty < 0.5
    assert fitted.held_out == 1.0
    again = fit_user(model, judged, pool=rows(THINGS, prefers_short=False), **options)
    torch.testing.assert_close(again.state, fitted.state, rtol=1e-3, atol=1e-4)
    assert not fit_user(model, judged, **options).opposite
    tokenized = [make_judgments(model, own, max_tokens=200, max_prompt_tokens=64) for own in (judged, held_out[:1])]
    unjudged = make_judgments(model, rows(THINGS, prefers_short=True), max_tokens=200, max_prompt_tokens=64)
    together = fit_judgments(model, tokenized, pool=unjudged, **likelihood(config))
    [alone] = fit_judgments(model, tokenized[1:], pool=unjudged, **likelihood(config))
    assert [one.opposite for one in together] == [True, False]
    torch.testing.assert_close(together[1].state, alone.state)


def test_who_judges_like_a_known_user_gets_that_state_with_a_pool_too() -> None:
    policy = make_policy()
    judged = as_judged_by(policy, make_judgments_of(policy, 12), 2)
    pools = (make_judgments_of(policy, 8, first=90), ())
    with_pool, without = (fit_judgments(policy, [judged], pool=pool, beta=30.0)[0] for pool in pools)
    assert (with_pool.known, with_pool.opposite) == (without.known, without.opposite) == (2, False)
    assert torch.equal(with_pool.state, without.state)


def test_the_slope_of_the_penalty_is_its_gradient() -> None:
    population = make_population(make_policy().user_encoder)  # type: ignore[arg-type]
    state = torch.randn(population.states.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state.requires_grad_()
    [gradient] = torch.autograd.grad(population.prior.penalty(state), state)
    torch.testing.assert_close(population.prior.slope(state.detach()), gradient)
