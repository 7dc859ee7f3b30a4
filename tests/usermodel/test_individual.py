"""The individualized user model: e_i = e_0 + o_i."""

from __future__ import annotations

import torch

from prlhf.usermodel import IndividualUserModel

U, T, D = 4, 2, 3


def _model() -> IndividualUserModel:
    """e_0 of ones; o_i is i times 10 everywhere."""
    model = IndividualUserModel(num_users=U, num_user_tokens=T, dim=D)
    model.init_(torch.ones(T, D))
    with torch.no_grad():
        model.offsets += 10.0 * torch.arange(1, U + 1)[:, None, None]
    return model


def test_offsets_start_at_zero_and_the_generic_user_at_the_initial_value():
    model = _model()
    initial = torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    model.init_(initial)
    assert torch.equal(model.offsets, torch.zeros(U, T, D))
    assert torch.equal(model.generic, initial)


def test_a_user_is_the_generic_one_plus_its_own_offset():
    soft_prompts = _model()(torch.tensor([0, 3, 1, 4]))
    assert torch.equal(soft_prompts, torch.tensor([1.0, 31.0, 11.0, 41.0])[:, None, None].expand(4, T, D))


def test_the_generic_user_is_e_0_bitwise_whatever_the_offsets_are():
    model = _model()
    with torch.no_grad():
        model.offsets.fill_(float("nan"))
    assert torch.equal(model(torch.tensor([0]))[0], model.generic)


def test_absent_users_are_neither_read_nor_trained():
    model = _model()
    with torch.no_grad():
        model.offsets[[0, 3]] = float("nan")
    soft_prompts = model(torch.tensor([2, 0, 3]))
    soft_prompts.sum().backward()
    assert soft_prompts.isfinite().all()
    assert torch.equal(model.offsets.grad, torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None, None].expand(U, T, D))


def test_rows_of_one_user_add_their_gradients():
    """Rows weigh 1, 2, 4, 8: user 2 collects 1 + 4, user 1 collects 8, the generic row trains e_0 alone."""
    model = _model()
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None]
    (weights * model(torch.tensor([2, 0, 2, 1]))).sum().backward()
    assert model.offsets.grad[:, 0, 0].tolist() == [8.0, 5.0, 0.0, 0.0]
    assert torch.equal(model.generic.grad, torch.full((T, D), 15.0))


def test_soft_prompt_gradient_is_right():
    model = _model().double()
    user_ids = torch.tensor([2, 0, 2])

    def soft_prompts(generic, offsets):
        return torch.func.functional_call(model, {"generic": generic, "offsets": offsets}, (user_ids,))

    assert torch.autograd.gradcheck(soft_prompts, (model.generic, model.offsets))
