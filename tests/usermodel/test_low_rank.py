"""The low-rank user model: e_i = e_0 + B w_i."""

from __future__ import annotations

import torch

from prlhf.usermodel import LowRankUserModel

U, T, D, R = 3, 2, 2, 2


def _model() -> LowRankUserModel:
    """e_0 is 1 everywhere; the directions are 9 and 99."""
    model = LowRankUserModel(num_users=U, num_user_tokens=T, dim=D, rank=R)
    model.init_(torch.tensor([1.0, 10.0, 100.0])[:, None, None].expand(1 + R, T, D))
    return model


def test_a_user_is_the_generic_one_plus_weighted_directions():
    """w_2 = (2, -1): 1 + 2 x 9 - 99 = -80; the generic user and one whose weights are zero stay at 1."""
    model = _model()
    with torch.no_grad():
        model.weights[1] = torch.tensor([2.0, -1.0])
    expected = torch.tensor([-80.0, 1.0, 1.0])[:, None, None].expand(3, T, D)
    assert torch.equal(model(torch.tensor([2, 0, 3])), expected)


def test_a_first_step_moves_the_weights_of_the_users_in_the_batch_alone():
    """At w = 0 the gradient of w_ir is the sum over direction r: 4 x 9 and 4 x 99."""
    model = _model()
    model(torch.tensor([2, 0])).sum().backward()
    assert torch.equal(model.weights.grad, torch.tensor([[0.0, 0.0], [36.0, 396.0], [0.0, 0.0]]))
    assert torch.equal(model.generic.grad, torch.full((T, D), 2.0))


def test_the_generic_user_leaves_basis_and_weights_alone():
    model = _model()
    with torch.no_grad():
        model.weights.fill_(1.0)
    model(torch.tensor([0])).sum().backward()
    assert not model.basis.grad.any() and not model.weights.grad.any()


def test_soft_prompt_gradient_is_right():
    model = _model().double()
    with torch.no_grad():
        model.weights.copy_(torch.arange(6.0).view(U, R) / 10)
    user_ids = torch.tensor([2, 0, 2])

    def soft_prompts(generic, basis, weights):
        parameters = {"generic": generic, "basis": basis, "weights": weights}
        return torch.func.functional_call(model, parameters, (user_ids,))

    assert torch.autograd.gradcheck(soft_prompts, (model.generic, model.basis, model.weights))
