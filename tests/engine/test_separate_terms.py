"""The individual and the generic term one after the other: the same step for half the activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from prlhf.engine.objective import Objective
from prlhf.engine.step import StepResult, accumulate_gradients_
from prlhf.engine.trainer import batches_of_step
from tests.engine.cuts import FULL_STEP, VARIANTS, assert_same, cut_config, gradients_of_step, reference_of
from tests.tiny_run import Tiny, perturbed_job

PERSONAL = [name for name, settings in VARIANTS.items() if settings["method"] in ("pdpo", "prm")]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("variant", PERSONAL)
def test_gradient_is_that_of_both_terms_at_once(tiny: Tiny, variant: str, packing: bool) -> None:
    config = cut_config(tiny, variant, train__packing=packing)
    apart = cut_config(tiny, variant, train__packing=packing, train__separate_terms=True)
    assert_same(gradients_of_step(apart, FULL_STEP), gradients_of_step(config, FULL_STEP))


def step_result(tiny: Tiny, variant: str, **settings: Any) -> tuple[StepResult, list[int]]:
    """Of a global batch in one micro-batch, and the bytes that each pass keeps for its backward."""
    job = perturbed_job(cut_config(tiny, variant, **settings))
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel() * tensor.element_size()
        return tensor

    def forward(self: Objective, *args: Any) -> Any:
        kept.append(0)
        with saved_tensors_hooks(count, lambda tensor: tensor):
            return original(self, *args)

    original = type(job.objective).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(job.objective), "__call__", forward)
        batches, num_rows = batches_of_step(job, FULL_STEP)
        assert len(batches) == 1
        result = accumulate_gradients_(
            job.model, job.objective, batches, reference_of=reference_of(job), num_global_rows=num_rows,
            autocast=job.autocast,
        )
    assert set(result.sums) == set(job.objective.figure_names())
    return result, kept


@pytest.mark.parametrize("variant", ["pdpo_individual", "kto", "prm_low_rank_prior"])
def test_figures_are_those_of_both_terms_at_once(tiny: Tiny, variant: str) -> None:
    """Rows, losses, the counts of liked ones, and the prior are counted once."""
    whole, _ = step_result(tiny, variant)
    apart, passes = step_result(tiny, variant, train__separate_terms=True)
    assert len(passes) == 2
    assert (apart.num_rows, apart.num_tokens) == (whole.num_rows, whole.num_tokens)
    assert set(apart.sums) == set(whole.sums)
    for name, value in whole.sums.items():
        torch.testing.assert_close(apart.sums[name], value, rtol=1e-5, atol=1e-5)


def test_each_pass_keeps_half_as_much(tiny: Tiny) -> None:
    _, [both] = step_result(tiny, "pdpo_individual_full")
    _, [individual, generic] = step_result(tiny, "pdpo_individual_full", train__separate_terms=True)
    assert max(individual, generic) < 0.6 * both


def test_one_term_is_one_pass() -> None:
    assert [len(Objective("pdpo", alpha=alpha, separate_terms=True).passes()) for alpha in (0.0, 0.5, 1.0)] == [1, 2, 1]
    assert len(Objective("dpo", separate_terms=True).passes()) == 1
