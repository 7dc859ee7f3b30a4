"""Attention over trees equals attention over each path by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf.models import shared_prefix
from prlhf.models.shared_prefix import tree_attention
from prlhf.models.trees import Trees, masked_tree_attention

TREES = Trees((7, 0, 12, 1), ((5,), (3, 4, 2), (9, 1), (1, 1, 1, 30)))
NUM_TOKENS = 5 + 7 + 9 + 22 + 34
NUM_HEADS, DIM = 3, 8
SCALE = 0.3


def _inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, NUM_TOKENS, NUM_HEADS, DIM)
    return [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def _path_by_path(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each prefix with one response at a time, through plain causal attention; (N, H, E)."""
    output = torch.zeros(NUM_TOKENS, NUM_HEADS, DIM, dtype=query.dtype)
    for (start, end), responses in TREES.spans:
        for span in responses:
            path = [*range(start, end), *range(*span)]
            scores = (query[0, :, path] @ key[0, :, path].transpose(1, 2)) * SCALE
            scores = scores.masked_fill(torch.ones(len(path), len(path)).triu(1).bool(), float("-inf"))
            output[path] = (scores.softmax(-1) @ value[0, :, path]).transpose(0, 1)
    return output


@pytest.mark.parametrize("attend", [tree_attention, masked_tree_attention])
def test_every_response_sees_its_prefix_and_itself_alone(attend):
    inputs = _inputs()
    output = attend(*inputs, TREES, SCALE)
    assert output.shape == (1, NUM_TOKENS, NUM_HEADS, DIM)
    torch.testing.assert_close(output[0], _path_by_path(*inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attend", [tree_attention, masked_tree_attention])
def test_gradients_are_those_of_the_paths(attend):
    inputs = _inputs()
    upstream = torch.linspace(-1, 1, NUM_TOKENS * NUM_HEADS * DIM, dtype=torch.float64)
    output = attend(*inputs, TREES, SCALE)
    gradients = torch.autograd.grad((output.flatten() * upstream).sum(), inputs)
    expected = torch.autograd.grad((_path_by_path(*inputs).flatten() * upstream).sum(), inputs)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11)


def test_bfloat16_stays_within_its_rounding():
    inputs = _inputs(torch.bfloat16)
    output = tree_attention(*inputs, TREES, SCALE)
    assert output.dtype == torch.bfloat16
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = _path_by_path(*wide)
    torch.testing.assert_close(output[0].double(), expected, rtol=0, atol=2e-2)
    upstream = torch.linspace(-1, 1, NUM_TOKENS * NUM_HEADS * DIM, dtype=torch.float64)
    gradients = torch.autograd.grad((output.double().flatten() * upstream).sum(), inputs)
    slopes = torch.autograd.grad((expected.flatten() * upstream).sum(), wide)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - slope).norm() < 1e-2 * slope.norm()


def test_without_torchs_kernel_the_masked_way_is_taken(monkeypatch):
    inputs = _inputs()
    expected = tree_attention(*inputs, TREES, SCALE)
    monkeypatch.setattr(shared_prefix, "_FLASH", None)
    output = tree_attention(*inputs, TREES, SCALE)
    assert not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


def test_longest_path_is_one_response_with_its_prefix():
    assert TREES.longest_path == 31


@pytest.mark.parametrize("setting", [{"softcap": 50.0}, {"s_aux": torch.zeros(3)}, {"sliding_window": 30}])
def test_what_changes_the_scores_is_refused(setting):
    query, key, value = _inputs()
    with pytest.raises(ValueError, match="cannot serve"):
        shared_prefix._attention(SimpleNamespace(), query, key, value, None, trees=TREES, **setting)


def test_a_window_as_wide_as_the_longest_path_changes_nothing():
    query, key, value = _inputs()
    output, _ = shared_prefix._attention(
        SimpleNamespace(), query, key, value, None, trees=TREES, scaling=SCALE, sliding_window=31
    )
    assert torch.equal(output, tree_attention(query, key, value, TREES, SCALE))


def test_without_trees_it_is_scaled_dot_product_attention():
    query, key, value = _inputs()
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    output, _ = shared_prefix._attention(module, query, key, value, None, scaling=SCALE)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE).transpose(1, 2)
    torch.testing.assert_close(output, expected)
