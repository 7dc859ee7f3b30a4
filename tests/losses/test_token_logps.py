"""Log-probs under a linear layer, against torch's own softmax over all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from prlhf.losses import linear_token_logps
from prlhf.losses.token_logps import CHUNK_TOKENS
from tests.largest_tensor import LargestTensor

NUM_TOKENS, DIM, VOCAB = 11, 5, 7


def _inputs(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, DIM, generator=generator, dtype=dtype) for n in (NUM_TOKENS, VOCAB))
    targets = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    return hidden, weight, torch.randn(VOCAB, generator=generator, dtype=dtype) if bias else None, targets


def test_equal_logits_give_each_token_its_share():
    logps = linear_token_logps(torch.ones(3, DIM), torch.zeros(VOCAB, DIM), None, torch.tensor([0, 3, 6]))
    assert logps.tolist() == pytest.approx([-1.9459101] * 3, abs=1e-6)  # ln 7


@pytest.mark.parametrize("chunk_logits", [1, 3 * VOCAB, 10**6], ids=["one token", "ragged chunks", "one chunk"])
@pytest.mark.parametrize("kept_logits", [0, 5 * VOCAB, 10**6], ids=["none kept", "some kept", "all kept"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_log_softmax_however_it_is_cut(chunk_logits, kept_logits, bias):
    hidden, weight, offset, targets = _inputs(bias=bias)
    leaves = [x.requires_grad_() for x in (hidden, weight, offset) if x is not None]
    upstream = torch.arange(1.0, NUM_TOKENS + 1, dtype=torch.float64)
    cut = {"chunk_logits": chunk_logits, "kept_logits": kept_logits}
    logps = linear_token_logps(hidden, weight, offset, targets, **cut)
    expected = F.linear(hidden, weight, offset).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((logps * upstream).sum(), leaves)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), leaves)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    hidden, weight, bias, targets = _inputs()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: linear_token_logps(h, w, b, targets, chunk_logits=21), leaves)


@pytest.mark.parametrize(("scale", "softcap"), [(0.25, None), (1.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("chunk_logits", [1, 3 * VOCAB, None], ids=["one token", "ragged chunks", "one chunk"])
@pytest.mark.parametrize("kept_logits", [0, 10**6], ids=["none kept", "all kept"])
def test_scaled_and_capped_logits_have_the_values_and_gradients_of_log_softmax(
    chunk_logits, kept_logits, scale, softcap
):
    hidden, weight, bias, targets = _inputs()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    upstream = torch.arange(1.0, NUM_TOKENS + 1, dtype=torch.float64)
    options = {"scale": scale, "softcap": softcap, "chunk_logits": chunk_logits, "kept_logits": kept_logits}
    logps = linear_token_logps(hidden, weight, bias, targets, **options)
    logits = scale * F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((logps * upstream).sum(), leaves)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), leaves)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("scale", "softcap"), [(0.25, None), (1.0, 2.0), (3.0, 1.5)])
def test_gradcheck_of_scaled_and_capped_logits(scale, softcap):
    hidden, weight, bias, targets = _inputs()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = {"scale": scale, "softcap": softcap, "chunk_logits": 21}
    assert torch.autograd.gradcheck(lambda h, w, b: linear_token_logps(h, w, b, targets, **options), leaves)


def test_capped_logits_under_autocast_have_slopes_near_those_in_float32():
    hidden, weight, _, targets = _inputs(torch.float32)
    gradients = []
    for enabled in (False, True):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            linear_token_logps(leaf, weight, None, targets, softcap=2.0).sum().backward()
        gradients.append(leaf.grad)
    assert 0 < (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_with_a_vocabulary_of_256_000_no_more_logits_exist_than_a_chunk_has(softcap):
    """128 tokens' at once, forward and backward, of a trained layer as well."""
    generator = torch.Generator().manual_seed(0)
    vocab, num_tokens = 256_000, 160
    hidden, weight = (torch.randn(n, 4, generator=generator).requires_grad_() for n in (num_tokens, vocab))
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    with LargestTensor() as largest:
        linear_token_logps(hidden, weight, None, targets, softcap=softcap).sum().backward()
    assert largest.numel == CHUNK_TOKENS * vocab == 32_768_000
    assert hidden.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("trained", "num_kept"), [(True, 6), (False, 0)])
def test_no_more_logits_are_kept_for_backward_than_asked_for_and_none_for_a_frozen_layer(trained, num_kept):
    """11 tokens, 3 at a time, and room for 8: two chunks are kept."""
    hidden, weight, _, targets = _inputs()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_token_logps(
            hidden.requires_grad_(), weight.requires_grad_(trained), None, targets,
            chunk_logits=3 * VOCAB, kept_logits=8 * VOCAB,
        )
    assert sum(len(x) for x in saved if x.dim() == 2 and x.shape[1] == VOCAB) == num_kept


def test_the_graph_may_be_gone_through_twice():
    hidden, weight, _, targets = _inputs()
    logps = linear_token_logps(hidden.requires_grad_(), weight.requires_grad_(), None, targets, chunk_logits=3 * VOCAB)
    first = torch.autograd.grad(logps.sum(), [hidden, weight], retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(logps.sum(), [hidden, weight]), first))


def test_a_frozen_layer_gets_no_gradient_and_still_passes_one_on():
    hidden, weight, _, targets = _inputs()
    linear_token_logps(hidden.requires_grad_(), weight, None, targets).sum().backward()
    assert weight.grad is None and (hidden.grad != 0).all()


def test_a_frozen_hidden_state_leaves_the_layer_its_gradient():
    hidden, weight, _, targets = _inputs()
    linear_token_logps(hidden, weight.requires_grad_(), None, targets).sum().backward()
    expected = F.one_hot(targets, VOCAB).double().T @ hidden - (hidden @ weight.detach().T).softmax(-1).T @ hidden
    torch.testing.assert_close(weight.grad, expected)


def test_logits_of_a_thousand_do_not_overflow():
    logps = linear_token_logps(torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]]), None, torch.tensor([1]))
    assert logps.tolist() == [-2000.0]


def test_under_autocast_matmuls_are_bfloat16_and_sums_float32():
    hidden, weight, _, targets = _inputs(torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = linear_token_logps(hidden, weight, None, targets)
    expected = (hidden.detach().bfloat16() @ weight.detach().bfloat16().T).float().log_softmax(-1)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)
    logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    slopes = F.one_hot(targets, VOCAB) - expected.exp()
    torch.testing.assert_close(weight.grad, slopes.T @ hidden.detach(), rtol=0, atol=0.05)
