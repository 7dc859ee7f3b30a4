"""The benchmark's ways differ in time alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import ways
from benchmarks.cpu import useful_flops
from prlhf.losses.token_logps import CHUNK_LOGITS
from tests.largest_tensor import LargestTensor


def gradient_of(bench: ways.Bench, way: str, step: ways.Step) -> tuple[torch.Tensor, torch.Tensor]:
    with ways.compiled_or_not(way):
        losses = ways.WAYS[way](bench, step)
        losses.mean().backward()
    trained = bench.policy.trainable().values()
    gradient = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    for optimizer in bench.optimizers:
        optimizer.zero_grad(set_to_none=True)
    return losses, gradient


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_all_ways_give_the_same_losses_and_gradients(lora: bool) -> None:
    bench = ways.make_bench(lora=lora, with_compiled=True)
    step = ways.make_step(bench, ways.draw_rows("psoups", np.random.default_rng(0))[:1])
    expected, gradient = gradient_of(bench, "packed", step)
    for way in ("padded", "authors", "compiled"):
        losses, other = gradient_of(bench, way, step)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
        assert (other - gradient).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("packed", [True, False])
def test_logits_exist_a_chunk_at_a_time_as_they_do_in_training(packed: bool) -> None:
    bench = ways.make_bench(lora=True)
    step = ways.make_step(bench, ways.draw_rows("psoups", np.random.default_rng(0))[:2])
    with LargestTensor() as largest:
        ways.prlhf_losses(bench, step, packed=packed)
    assert largest.numel == CHUNK_LOGITS // 32000 * 32000


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_trl_starts_where_its_reference_is_and_knows_it_beforehand_or_not(lora: bool) -> None:
    pytest.importorskip("trl")
    bench = ways.make_bench(lora=lora, with_trl=True)
    assert bench.trl is not None
    step = ways.make_step(bench, ways.draw_rows("tldr", np.random.default_rng(0))[:2])
    loss = ways.WAYS["trl"](bench, step)
    assert loss.item() == pytest.approx(np.log(2), abs=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in bench.trl.parameters())
    shifted = ways.ReferenceLogps(step.reference.chosen + 1.0, step.reference.rejected)
    known = bench.trl.loss(step.rows, step.reference)
    assert bench.trl.loss(step.rows, shifted).item() > known.item()


def test_useful_flops_are_those_of_a_hand_count() -> None:
    """A prompt of 1 and 10 soft tokens, responses of 2 and 3: 16 tokens a tree, 5 of them before a scored position."""
    row = ways.TokenizedPair(0, 1, (1,), (5, 6), (7, 8, 9))
    linear = 8 * (4 * 384**2 + 3 * 384 * 1024)
    dense = 2 * 16 * linear + 2 * 384 * 32000 * 5
    pairs = 11**2 / 2 + (11 * 2 + 2) + (11 * 3 + 4.5)
    full, lora = (useful_flops([row], ways.small_llama(), lora=lora) for lora in (False, True))
    assert full == pytest.approx(2 * 3 * (dense + 4 * 384 * 8 * pairs))
    assert lora == pytest.approx(full - 2 * dense)
