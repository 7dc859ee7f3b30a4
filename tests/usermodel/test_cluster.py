"""The cluster-based user model: e_i = V softmax(a_i)."""

from __future__ import annotations

import math

import pytest
import torch

from prlhf.usermodel import ClusterUserModel

U, T, D, K = 3, 2, 2, 3


def _model() -> ClusterUserModel:
    """Rows of V are constants 1, 10, 100."""
    model = ClusterUserModel(num_users=U, num_user_tokens=T, dim=D, num_clusters=K)
    model.init_(torch.tensor([1.0, 10.0, 100.0])[:, None, None].expand(K, T, D))
    return model


def test_rows_of_v_are_the_distinct_initial_ones_and_weights_start_at_zero():
    model = _model()
    initial = model.basis.detach().clone()
    with torch.no_grad():
        model.basis.zero_()
        model.weights.fill_(1.0)
    model.init_(initial)
    assert model.basis[:, 0, 0].tolist() == [1.0, 10.0, 100.0]
    assert torch.equal(model.weights, torch.zeros(U + 1, K))


def test_equal_rows_of_v_are_refused():
    """Equal clusters under equal weights get equal gradients for ever."""
    initial = torch.randn(K, T, D, generator=torch.Generator().manual_seed(0))
    initial[2] = initial[0]
    with pytest.raises(ValueError, match="the 3 clusters must all differ"):
        _model().init_(initial)


def test_all_users_start_as_the_even_mixture():
    """(1 + 10 + 100) / 3 = 37."""
    soft_prompts = _model()(torch.arange(U + 1))
    torch.testing.assert_close(soft_prompts, torch.full((U + 1, T, D), 37.0))


def test_weights_are_a_softmax_of_the_users_row():
    """a_2 = (ln 1, ln 2, ln 5) gives shares 1/8, 2/8, 5/8: (1 + 20 + 500) / 8 = 65.125; the generic row is its own."""
    model = _model()
    with torch.no_grad():
        model.weights[2] = torch.tensor([0.0, math.log(2), math.log(5)])
        model.weights[0] = torch.tensor([0.0, math.log(2), 0.0])
    shares = model.cluster_shares(torch.tensor([2, 0]))
    torch.testing.assert_close(shares, torch.tensor([[0.125, 0.25, 0.625], [0.25, 0.5, 0.25]]))
    soft_prompts = model(torch.tensor([2, 0, 1]))
    # (1 + 20 + 100) / 4 = 30.25
    expected = torch.tensor([65.125, 30.25, 37.0])[:, None, None].expand(3, T, D)
    torch.testing.assert_close(soft_prompts, expected)


def test_the_start_lets_a_user_move_towards_a_cluster():
    """At even shares s = 1/3 the gradient of a_k is s (v_k - mean v), summed over T D = 4 equal entries."""
    model = _model()
    model(torch.tensor([1])).sum().backward()
    expected = torch.tensor([(value - 37.0) * 4 / 3 for value in (1.0, 10.0, 100.0)])
    torch.testing.assert_close(model.weights.grad[1], expected)
    assert torch.equal(model.weights.grad[[0, 2, 3]], torch.zeros(3, K))


def test_soft_prompt_gradient_is_right():
    model = _model().double()
    user_ids = torch.tensor([2, 0, 2])

    def soft_prompts(basis, weights):
        return torch.func.functional_call(model, {"basis": basis, "weights": weights}, (user_ids,))

    assert torch.autograd.gradcheck(soft_prompts, (model.basis, model.weights))
