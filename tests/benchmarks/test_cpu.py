"""The benchmark's ways differ in time alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import cpu


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_all_ways_give_the_same_losses_and_gradients(lora: bool) -> None:
    bench = cpu.make_bench(lora=lora)
    batch = cpu.collate_pairs(cpu.draw_rows("psoups", np.random.default_rng(0))[:1], pad_id=0)
    reference = cpu.LiveReference(bench.policy.reference)(batch)
    losses, gradients = {}, {}
    for way, losses_of in cpu.WAYS.items():
        losses[way] = losses_of(bench, batch, reference)
        losses[way].mean().backward()
        trained = bench.policy.trainable().values()
        gradients[way] = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        bench.optimizer.zero_grad(set_to_none=True)
    for way in ("padded", "authors"):
        torch.testing.assert_close(losses[way], losses["packed"], rtol=1e-4, atol=1e-4)
        assert (gradients[way] - gradients["packed"]).norm() < 1e-3 * gradients["packed"].norm()


def test_useful_flops_are_those_of_a_hand_count() -> None:
    """A prompt of 1 and 10 soft tokens, responses of 2 and 3: 16 tokens a tree, 5 of them before a scored position."""
    row = cpu.TokenizedPair(0, 1, (1,), (5, 6), (7, 8, 9))
    linear = 8 * (4 * 384**2 + 3 * 384 * 1024)
    dense = 2 * 16 * linear + 2 * 384 * 32000 * 5
    pairs = 11**2 / 2 + (11 * 2 + 2) + (11 * 3 + 4.5)
    assert cpu.useful_flops([row], lora=False) == pytest.approx(2 * 3 * (dense + 4 * 384 * 8 * pairs))
    assert cpu.useful_flops([row], lora=True) < cpu.useful_flops([row], lora=False)
