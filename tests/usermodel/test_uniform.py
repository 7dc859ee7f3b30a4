"""The uniform user model: one soft prompt."""

from __future__ import annotations

import torch

from prlhf.usermodel import UniformUserModel


def test_every_user_is_the_initial_soft_prompt():
    model = UniformUserModel(num_users=2, num_user_tokens=1, dim=2)
    model.init_(torch.tensor([[1.0, 2.0]]))
    assert model(torch.tensor([0, 1, 2])).tolist() == [[[1.0, 2.0]]] * 3


def test_every_row_trains_the_one_soft_prompt():
    model = UniformUserModel(num_users=2, num_user_tokens=1, dim=2)
    weights = torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    (weights * model(torch.tensor([0, 1, 2]))).sum().backward()
    assert model.generic.grad.tolist() == [[111.0, 111.0]]
