"""FlexAttention over trees gives what the dense masks give; its kernels need a GPU, its arithmetic does not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint

from prlhf.models import flex_trees
from prlhf.models.flex_trees import flex_tree_attention, is_served, make_block_mask
from prlhf.models.packing import set_up_packing_
from prlhf.models.shared_prefix import tree_attention
from prlhf.models.trees import Trees, masked_tree_attention
from tests.policies import make_batch, make_row, tiny_policy

CPU = torch.device("cpu")
SCALE = 0.3
SHAPES = {
    "one response": Trees((40,), ((30,),)),
    "several responses": Trees((140, 3), ((20, 50, 4), (1, 2))),
    "no prefix": Trees((0, 5, 0), ((130, 20), (3,), (9,))),
    "blocks in one tree": Trees((300,), ((260, 140),)),
    "whole blocks": Trees((128, 256), ((128,), (128, 128))),
}


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention uncompiled, and with the gradients that torch refuses to take on the CPU."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_trees, "_kernel", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(flex_trees, "DEVICES", ("cpu",))
    flex_trees._refusal.cache_clear()
    yield
    flex_trees._refusal.cache_clear()


def _inputs(trees: Trees, num_query_heads: int, num_key_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, trees.num_tokens, heads, 16, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (num_query_heads, num_key_heads, num_key_heads)
    ]


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("trees", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_those_of_the_dense_masks(flex_on_cpu, trees, heads):
    inputs = _inputs(trees, *heads)
    upstream = torch.linspace(-1, 1, trees.num_tokens * heads[0] * 16, dtype=torch.float64)
    output, expected = (
        attend(*inputs, trees, SCALE) for attend in (flex_tree_attention, masked_tree_attention)
    )
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-13)
    gradients, references = (
        torch.autograd.grad((result.flatten() * upstream).sum(), inputs) for result in (output, expected)
    )
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("trees", SHAPES.values(), ids=SHAPES)
def test_blocks_are_those_that_torch_counts_in_the_mask_of_all_pairs(trees):
    mask = make_block_mask(trees, CPU)
    length = trees.num_tokens
    expected = torch_flex.create_block_mask(mask.mask_mod, 1, 1, length, length, device="cpu")
    parts = [
        (ours, theirs) for ours, theirs in zip(mask.as_tuple(), expected.as_tuple(), strict=True) if ours is not theirs
    ]
    tensors = [(ours, theirs) for ours, theirs in parts if isinstance(ours, Tensor)]
    assert len(tensors) == 8  # numbers and places of blocks, in part and in whole, by rows and by columns
    assert all(torch.equal(ours, theirs) and ours.dtype == theirs.dtype for ours, theirs in tensors)
    assert mask.shape == (1, 1, length, length)


def test_blocks_in_which_nothing_is_seen_are_skipped():
    """Four trees of two blocks each: of 64 blocks, 3 a tree are seen."""
    mask = make_block_mask(Trees((128,) * 4, ((128,),) * 4), CPU)
    assert int(mask.to_dense().sum()) == 12
    assert int(mask.full_kv_num_blocks.sum()) == 4


def test_all_layers_share_the_mask_of_a_pack():
    trees = SHAPES["several responses"]
    assert make_block_mask(trees, CPU) is make_block_mask(Trees(trees.prefixes, trees.responses), CPU)


def test_packs_of_a_policy_go_through_flex_attention_and_give_what_padded_rows_give(flex_on_cpu, monkeypatch):
    policy, calls = tiny_policy(), []
    policy.packing = set_up_packing_(policy.backbone)
    real = flex_trees._kernel
    monkeypatch.setattr(flex_trees, "_kernel", lambda: calls.append(0) or real())
    batch = make_batch(policy, [make_row(policy, i, user_id=i, lengths=(60, 30, 20)) for i in (1, 2)])
    values, tokens = policy.sequence_logps(batch, batch.user_ids)
    assert len(calls) == 4, "two packs to try it, two layers"
    expected, _ = policy.padded_values(batch, batch.user_ids)
    assert ((values - expected).abs() / tokens).max() < 1e-5  # nats; float32 sums in another order
    parameters = list(policy.trainable().values())
    gradient, reference = (
        torch.cat([part.flatten() for part in torch.autograd.grad((x * x.detach()).sum(), parameters)])
        for x in (values, expected)
    )
    assert (gradient - reference).norm() < 1e-5 * reference.norm()


def test_packs_within_a_block_and_devices_without_it_stay_as_they_were(flex_on_cpu, monkeypatch):
    query = torch.zeros(1, 2, 128, 16)
    assert not is_served(query, query)
    query = torch.zeros(1, 2, 129, 16)
    assert is_served(query, query)
    monkeypatch.setattr(flex_trees, "DEVICES", ("cuda",))
    assert not is_served(query, query)


def _fails(*args: object, **kwargs: object) -> Tensor:
    raise RuntimeError("Cannot find a working triton installation\nand more")


def _leaks(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    del options["block_mask"]
    return torch_flex.flex_attention(query, key, value, **options)


@pytest.mark.parametrize(
    ("kernel", "dtype", "reason"),
    [
        (_fails, torch.float32, "RuntimeError: Cannot find a working triton installation"),
        (_leaks, torch.float32, "off by"),
        (torch_flex.flex_attention, torch.float64, "no kernel computes in torch.float64"),
    ],
    ids=["no compiler", "wrong numbers", "float64"],
)
def test_where_it_does_not_work_the_dense_masks_do_and_the_log_says_why(
    flex_on_cpu, monkeypatch, caplog, kernel, dtype, reason
):
    monkeypatch.setattr(flex_trees, "_kernel", lambda: kernel)
    trees = SHAPES["several responses"]
    inputs = _inputs(trees, 4, 2, dtype)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            output = tree_attention(*inputs, trees, SCALE)
    torch.testing.assert_close(output, masked_tree_attention(*inputs, trees, SCALE))
    assert len(caplog.records) == 1 and reason in caplog.text and "and more" not in caplog.text


def test_the_trial_inside_a_checkpointed_layer_is_not_part_of_the_layer(flex_on_cpu):
    """Recomputed without the trial, the layer must still save as many tensors as before."""
    trees = SHAPES["several responses"]
    inputs = _inputs(trees, 2, 2, torch.float32)

    def layer(*inputs: Tensor) -> Tensor:
        return tree_attention(*inputs, trees, SCALE)

    output = checkpoint(layer, *inputs, use_reentrant=False)
    gradient = torch.autograd.grad(output.square().sum(), inputs)[0]
    expected = torch.autograd.grad(layer(*inputs).square().sum(), inputs)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.slow
def test_packs_of_every_length_share_what_is_compiled(flex_on_cpu, monkeypatch):
    compiled = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph

    kernel = torch.compile(torch_flex.flex_attention, backend=count)
    monkeypatch.setattr(flex_trees, "_kernel", lambda: kernel)
    for trees in (*flex_trees.PROBES, *SHAPES.values()):
        if trees.num_tokens > flex_trees.BLOCK:
            inputs = _inputs(trees, 4, 2)
            expected = masked_tree_attention(*inputs, trees, SCALE)
            torch.testing.assert_close(flex_tree_attention(*inputs, trees, SCALE), expected, rtol=1e-11, atol=1e-13)
    assert len(compiled) == 2, "one for the first length, one for all others"


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
def test_compiled_outputs_and_gradients_are_those_of_the_dense_masks(heads):
    for trees in SHAPES.values():
        inputs = [x.detach().to("cuda").requires_grad_() for x in _inputs(trees, *heads, torch.float32)]
        assert is_served(*inputs[:2]) is (trees.num_tokens > flex_trees.BLOCK)
        output, expected = (attend(*inputs, trees, SCALE) for attend in (tree_attention, masked_tree_attention))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        gradients, references = (torch.autograd.grad(result.square().sum(), inputs) for result in (output, expected))
        for gradient, reference in zip(gradients, references, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-3)
