"""A step is the same step however its global batch is cut, and a step that is not finite is none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf.data.collate import collate_responses
from prlhf.data.tokenize import TokenizedResponse
from prlhf.engine.build import Job, build_job
from prlhf.engine.trainer import batches_of_step, train
from prlhf.models.packing import Packing
from tests.engine.cuts import (
    FULL_STEP,
    RAGGED_STEP,
    VARIANTS,
    assert_same,
    cut_config,
    gradients_of,
    gradients_of_one_row,
    gradients_of_step,
    gradients_of_users_apart,
    parameters_after_sgd,
    reference_of,
    step_of,
)
from tests.engine.two_ranks import inf_gradient_, nan_loss_, read, state_of
from tests.tiny_run import Tiny, perturb_, perturbed_job, read_metrics

SMALL_MICROBATCH = 250  # tokens: one pair or a few responses


@pytest.mark.parametrize("variant", VARIANTS)
def test_microbatching_does_not_change_gradient(tiny: Tiny, variant: str) -> None:
    small = perturbed_job(cut_config(tiny, variant, train__microbatch_tokens=SMALL_MICROBATCH))
    whole = perturbed_job(cut_config(tiny, variant))
    cut, uncut = (batches_of_step(job, FULL_STEP) for job in (small, whole))
    assert len(cut[0]) >= 2 and len(uncut[0]) == 1
    assert_same(gradients_of(small, *cut), gradients_of(whole, *uncut))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_have_the_gradient_of_one(tiny: Tiny, two_ranks: Path, variant: str) -> None:
    """At the ragged end of the epoch one of the ranks has no row at all."""
    for step in (FULL_STEP, RAGGED_STEP):
        expected = gradients_of_step(cut_config(tiny, variant), step)
        assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "offsets" not in name)
        for actual in read(two_ranks, f"{variant}-{step}"):
            assert_same(actual, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_make_the_step_of_one(tiny: Tiny, two_ranks: Path, variant: str) -> None:
    expected = parameters_after_sgd(cut_config(tiny, variant))
    first, second = read(two_ranks, f"{variant}-sgd")
    assert_same(first, expected)
    assert all(torch.equal(first[name], second[name]) for name in expected), "ranks must not drift apart"


def test_users_on_one_rank_only_equal_one_process(tiny: Tiny, two_ranks: Path) -> None:
    expected = gradients_of_users_apart(cut_config(tiny, "pdpo_individual"), 0, 1)
    assert expected["user_encoder.offsets"].flatten(1).norm(dim=1).min() > 0
    for actual in read(two_ranks, "users_apart"):
        assert_same(actual, expected)


def test_a_rank_without_rows_shares_the_estimate_of_the_kl(tiny: Tiny, two_ranks: Path) -> None:
    expected = gradients_of_one_row(cut_config(tiny, "kto"), 0)
    for actual in read(two_ranks, "one_row"):
        assert_same(actual, expected)


def kto_row_by_row(job: Job, rows: list[Any]) -> Tensor:
    """Mean of alpha l(u) + (1 - alpha) l(0), l = 1 - sigmoid(+-beta (r - z)), one unpadded sequence at a time."""

    def logratio(row: Any, response: tuple[int, ...], user: int) -> Tensor:
        batch = collate_responses([TokenizedResponse(0, user, row.prompt_ids, response)], job.pad_id)
        reference = job.model.reference.sequence_logps(batch)[0]
        return job.model.sequence_logps(batch, torch.tensor([user]))[0] - reference

    def term(users: list[int]) -> Tensor:
        paired = list(zip(rows, users, strict=True))
        with torch.no_grad():
            kl = torch.cat([logratio(row, row.mismatched_ids, user) for row, user in paired]).mean().clamp(min=0)
        ratios = torch.cat([logratio(row, row.response_ids, user) for row, user in paired])
        liked = torch.tensor([row.label for row in rows])
        up, down = (1 - torch.sigmoid(0.1 * sign * (ratios - kl)) for sign in (1, -1))
        return torch.where(liked, 1.5 * up, down)

    return (0.3 * term([row.user_id for row in rows]) + 0.7 * term([0] * len(rows))).mean()


def test_gradient_of_kto_is_that_of_the_mean_row_loss(tiny: Tiny) -> None:
    """The KL is that of the whole step, though the step is cut into several micro-batches."""
    config = cut_config(tiny, "kto", train__microbatch_tokens=SMALL_MICROBATCH, loss__alpha=0.3)
    job = perturbed_job(config)
    batches, num_rows = batches_of_step(job, FULL_STEP)
    assert len(batches) >= 2 and num_rows == 8
    rows = [job.rows[i] for batch in batches for i in batch.rows.tolist()]
    assert {row.label for row in rows} == {True, False}
    kto_row_by_row(job, rows).backward()
    expected = {name: parameter.grad.clone() for name, parameter in job.model.trainable().items()}
    job.model.zero_grad()
    assert_same(gradients_of(job, batches, num_rows), expected)


def row_by_row_loss(job: Job, rows: list[Any]) -> Tensor:
    """The mean of -alpha log sigmoid(beta h_u) - (1 - alpha) log sigmoid(beta h_0), one unpadded sequence at a time."""
    losses = []
    for row in rows:

        def logp(response: tuple[int, ...], user: int | None, prompt: tuple[int, ...] = row.prompt_ids) -> Tensor:
            batch = collate_responses([TokenizedResponse(0, user or 0, prompt, response)], job.pad_id)
            if user is None:
                return job.model.reference.sequence_logps(batch)[0]
            return job.model.sequence_logps(batch, torch.tensor([user]))[0]

        def margin(user: int | None, row: Any = row) -> Tensor:
            return logp(row.chosen_ids, user) - logp(row.rejected_ids, user)

        terms = [F.logsigmoid(0.1 * (margin(user) - margin(None))) for user in (row.user_id, 0)]
        losses.append(-0.3 * terms[0] - 0.7 * terms[1])
    return torch.cat(losses).mean()


def test_gradient_is_that_of_the_mean_row_loss(tiny: Tiny) -> None:
    job = perturbed_job(tiny.config(train__batch_rows=8, train__microbatch_tokens=SMALL_MICROBATCH, loss__alpha=0.3))
    batches, _ = batches_of_step(job, FULL_STEP)
    rows = [job.rows[i] for batch in batches for i in batch.rows.tolist()]
    row_by_row_loss(job, rows).backward()
    expected = {name: parameter.grad.clone() for name, parameter in job.model.trainable().items()}
    job.model.zero_grad()
    assert_same(gradients_of(job, batches, len(rows)), expected)


def test_rows_with_one_prompt_share_a_micro_batch_that_computes_their_generic_tree_once(tiny: Tiny) -> None:
    settings = {"train__batch_rows": 16, "train__group_pairs": False, "train__microbatch_tokens": 700}
    job = perturbed_job(tiny.config(**settings))
    batches, _ = batches_of_step(job, FULL_STEP)
    places: dict[tuple[int, ...], list[int]] = {}
    for number, batch in enumerate(batches):
        for row in batch.rows.tolist():
            places.setdefault(job.rows[row].prompt_ids, []).append(number)
    assert len(batches) > 2 and sum(len(numbers) > 1 for numbers in places.values()) > 3
    assert all(len(set(numbers)) == 1 for numbers in places.values())


@pytest.mark.parametrize("variant", ["pdpo_individual", "prm_individual"])
def test_with_alpha_0_the_generic_user_alone_has_a_gradient(tiny: Tiny, variant: str) -> None:
    gradients = gradients_of_step(cut_config(tiny, variant, loss__alpha=0.0), FULL_STEP)
    assert "user_encoder.offsets" in perturbed_job(cut_config(tiny, variant)).model.trainable()
    assert "user_encoder.offsets" not in gradients or not gradients["user_encoder.offsets"].any()
    assert gradients["user_encoder.generic"].abs().max() > 0


def test_rows_beyond_a_sliding_window_make_no_micro_batch_larger_than_the_budget(tiny: Tiny) -> None:
    """Half of the rows are beyond it, and the step's gradient is that of the whole step padded."""
    budget = 600
    job, whole = (perturbed_job(tiny.config(train__batch_rows=8, **{f"train__{key}": value}))
                  for key, value in (("microbatch_tokens", budget), ("packing", False)))
    rows = job.sampler.rows_of_step(FULL_STEP)
    lengths = sorted(job.rows[i].num_tokens for i in rows)
    window = lengths[3] + job.model.soft_prompt.num_user_tokens
    assert lengths[3] < lengths[4] and job.model.packing is not None
    job.model.packing = Packing(window)
    batches, num_rows = batches_of_step(job, FULL_STEP)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == sorted(job.rows[i].row for i in rows)
    positions = []
    hook = job.model.backbone.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    assert_same(gradients_of(job, batches, num_rows), gradients_of(whole, *batches_of_step(whole, FULL_STEP)))
    hook.remove()
    assert any(count == 1 for count, _ in positions) and any(count > 1 for count, _ in positions)
    assert all(count * width <= budget or count <= 2 for count, width in positions)


@pytest.mark.parametrize("lora", [{}, {"model__lora": None}], ids=["lora", "full"])
def test_the_losses_of_20_steps_over_packed_rows_are_those_over_padded_rows(tiny: Tiny, lora: dict[str, None]) -> None:
    curves = []
    for packing in (True, False):
        job = build_job(tiny.config(train__packing=packing, train__batch_rows=8, loss__alpha=0.3, **lora))
        assert (job.model.packing is not None) is packing
        results = [step_of(job, step, job.optimizer, max_grad_norm=1.0) for step in range(20)]
        curves.append(torch.stack([result.sums["loss"] / result.num_rows for result in results]))
    packed, padded = curves
    assert packed[-3:].mean() < packed[:3].mean() - 1e-2, "the policy learns"
    assert not torch.equal(packed, padded), "both ran the same code"
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [{}, {"model__lora": None}])
def test_gradient_checkpointing_does_not_change_gradient(tiny: Tiny, lora: dict[str, None]) -> None:
    plain, checkpointed = (
        gradients_of_step(tiny.config(model__gradient_checkpointing=on, **lora), FULL_STEP) for on in (False, True)
    )
    assert_same(checkpointed, plain)


def test_gradient_checkpointing_recomputes_the_blocks(tiny: Tiny) -> None:
    calls = []
    job = build_job(tiny.config(model__gradient_checkpointing=True))
    job.model.backbone.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(0))
    batches, num_rows = batches_of_step(job, FULL_STEP)
    gradients_of(job, batches, num_rows)
    assert len(calls) == 3, "reference once; both terms together once forward and once again in backward"


def test_first_loss_without_soft_prompt_is_ln_2(tiny: Tiny) -> None:
    job = build_job(tiny.config(method="dpo"))
    result = step_of(job, 0, job.optimizer, max_grad_norm=1.0)
    assert result.num_rows == 4
    assert float(result.sums["loss"]) / 4 == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert float(result.sums[name]) == 0.0


@pytest.mark.parametrize("settings", [{}, {"model__lora": None}, {"model__lora__dropout": 0.2}])
def test_steps_leave_the_reference_bitwise_alone(tiny: Tiny, settings: dict[str, Any]) -> None:
    job = build_job(tiny.config(**settings))
    batch = batches_of_step(job, 0)[0][0]
    before = reference_of(job)(batch)
    policy_before = job.model.logps(batch, batch.user_ids).chosen
    for step in range(3):
        step_of(job, step, job.optimizer, max_grad_norm=1.0)
    after = reference_of(job)(batch)
    assert torch.equal(before.chosen, after.chosen)
    assert torch.equal(before.rejected, after.rejected)
    assert not torch.equal(policy_before, job.model.logps(batch, batch.user_ids).chosen), "the policy has moved"


@pytest.mark.parametrize("break_", [nan_loss_, inf_gradient_])
def test_non_finite_step_changes_nothing(tiny: Tiny, break_: Any) -> None:
    job = perturb_(build_job(tiny.config()))
    step_of(job, 0, job.optimizer, max_grad_norm=1.0)
    before = state_of(job)
    break_(job)
    result = step_of(job, 1, job.optimizer, max_grad_norm=1.0)
    assert result.skipped
    after = state_of(job)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("case", ["nan_loss", "inf_gradient"])
def test_non_finite_on_one_rank_skips_the_step_on_both(two_ranks: Path, case: str) -> None:
    ranks = read(two_ranks, case)
    for seen in ranks:
        assert seen["skipped"]
        assert seen["gradients_left"] == [], "a NaN left in .grad would ruin the next step"
        assert all(torch.equal(seen["before"][name], seen["after"][name]) for name in seen["before"])
    assert any(".exp_avg" in name for name in ranks[0]["before"])


def test_bf16_keeps_weights_and_log_probs_in_float32(tiny: Tiny) -> None:
    job = perturbed_job(tiny.config(train__precision="bf16"))
    batch = batches_of_step(job, 0)[0][0]
    with job.autocast():
        logps = job.model.logps(batch, batch.user_ids)
    exact = job.model.logps(batch, batch.user_ids)
    assert logps.chosen.dtype == torch.float32
    assert not torch.equal(logps.chosen, exact.chosen), "nothing was computed in bf16"
    torch.testing.assert_close(logps.chosen, exact.chosen, rtol=1e-2, atol=0.0)  # bf16 has 8 bits of mantissa
    assert {parameter.dtype for parameter in job.model.parameters()} == {torch.float32}


def test_bf16_gradient_is_near_the_float32_one(tiny: Tiny) -> None:
    exact, rough = (
        torch.cat([part.flatten() for part in gradients_of_step(tiny.config(train__precision=name), 0).values()])
        for name in ("fp32", "bf16")
    )
    assert not torch.equal(exact, rough)
    assert F.cosine_similarity(exact, rough, dim=0) > 0.98


def test_policy_and_reference_are_one_function_for_the_kl_in_bf16_too(tiny: Tiny, tmp_path: Path) -> None:
    """Before the first step, with a reference that is computed anew."""
    settings = {"method": "dpo", "loss__kind": "kto", "model__reference": "live", "train__precision": "bf16"}
    train(tiny.config(train__max_steps=1, **settings), tmp_path / "run")
    assert read_metrics(tmp_path / "run")[0]["kl"] == 0
