"""user.prior: an epoch adds the MAP penalty once, and users with few rows stay near the generic one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from prlhf.engine.build import build_job
from prlhf.engine.objective import Objective
from prlhf.engine.shrinkage import PRIOR_FIGURE, ShrunkObjective
from prlhf.engine.trainer import batches_of_step, train
from prlhf.models import load_reward_model
from tests.engine.cuts import reference_of
from tests.tiny_run import NUM_TRAIN_ROWS, Tiny, perturbed_job, read_metrics

NAMES = {"individual": "offsets", "low_rank": "weights"}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("method", ["pdpo", "prm"])
def test_the_rows_of_an_epoch_add_half_the_precision_times_the_squares(tiny: Tiny, kind: str, method: str) -> None:
    """ann has 9 rows and bob 8: each row's share differs, the sum is lambda / 2 (|o_1|^2 + |o_2|^2)."""
    job = perturbed_job(tiny.config(method=method, user__kind=kind, user__prior=30.0, train__batch_rows=NUM_TRAIN_ROWS))
    assert job.model.user_encoder is not None
    parameter = job.model.user_encoder.get_parameter(NAMES[kind])
    (batch,), _ = batches_of_step(job, 0)
    reference = reference_of(job)(batch)
    with_prior = job.objective(job.model, batch, reference)
    plain = Objective(method, beta=job.objective.beta, alpha=job.objective.alpha)(job.model, batch, reference)
    expected = 15 * parameter.square().sum().item()
    added = with_prior.losses - plain.losses
    # 1e-4: the difference of two losses in float32.
    assert added.sum().item() == pytest.approx(expected, rel=1e-4)
    shares = [15 * row.square().sum().item() / count for row, count in zip(parameter, (9, 8), strict=True)]
    assert added.tolist() == pytest.approx([shares[user - 1] for user in batch.user_ids.tolist()], rel=1e-4, abs=1e-6)
    assert with_prior.sums["loss"].item() == pytest.approx(plain.sums["loss"].item() + expected, rel=1e-5)
    assert with_prior.sums[PRIOR_FIGURE].item() == pytest.approx(expected, rel=1e-5)
    gradient = torch.autograd.grad(added.sum(), parameter)[0]
    torch.testing.assert_close(gradient, 30 * parameter, rtol=1e-3, atol=1e-4)


def test_without_a_prior_the_objective_is_the_plain_one(tiny: Tiny) -> None:
    assert type(build_job(tiny.config()).objective) is Objective
    assert type(build_job(tiny.config(user__prior=1e-9)).objective) is ShrunkObjective


def test_a_strong_prior_keeps_users_near_the_generic_one(tiny: Tiny, tmp_path: Path) -> None:
    norms = {}
    for prior in (0.0, 1e3):
        run_dir = tmp_path / f"run_{prior}"
        train(tiny.config(method="prm", user__prior=prior, train__max_steps=15), run_dir)
        (line,) = read_metrics(run_dir)[-1:]
        assert (PRIOR_FIGURE in line) == (prior > 0)
        norms[prior] = load_reward_model(run_dir).user_encoder.offsets.norm().item()
    assert norms[1e3] < 0.2 * norms[0.0]


def test_generic_rows_have_no_share(tiny: Tiny) -> None:
    job = perturbed_job(tiny.config(method="prm", user__prior=5.0))
    (batch,), _ = batches_of_step(job, 0)
    generic = dataclasses.replace(batch, user_ids=torch.zeros_like(batch.user_ids))
    assert job.objective(job.model, generic, None).sums[PRIOR_FIGURE].item() == 0.0
