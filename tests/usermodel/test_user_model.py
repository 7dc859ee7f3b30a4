"""What every user model promises: shapes, ids, refusals, and a state that survives saving."""

from __future__ import annotations

import pytest
import torch

from prlhf.usermodel import (
    ClusterUserModel,
    HistoryUserModel,
    IndividualUserModel,
    LowRankUserModel,
    TextUserModel,
    UniformUserModel,
    UserContext,
    UserModel,
)

U, T, D, K, R, H = 5, 3, 4, 2, 2, 6


def _initial(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _make(kind: str) -> UserModel:
    if kind == "cluster":
        model = ClusterUserModel(num_users=U, num_user_tokens=T, dim=D, num_clusters=K)
        model.init_(_initial(K, T, D))
        return model
    if kind == "low_rank":
        model = LowRankUserModel(num_users=U, num_user_tokens=T, dim=D, rank=R)
        model.init_(_initial(1 + R, T, D))
        return model
    sizes = {"num_users": U, "num_user_tokens": T, "dim": D}
    if kind in ("text", "history"):
        model = {"text": TextUserModel, "history": HistoryUserModel}[kind](hidden_dim=H, **sizes)
    else:
        model = {"uniform": UniformUserModel, "individual": IndividualUserModel}[kind](**sizes)
    model.init_(_initial(T, D))
    return model


TABLES = ["uniform", "individual", "cluster", "low_rank"]
KINDS = [*TABLES, "text", "history"]
LAYOUTS = {
    "uniform": {"generic": (T, D)},
    "individual": {"generic": (T, D), "offsets": (U, T, D)},
    "cluster": {"basis": (K, T, D), "weights": (U + 1, K)},
    "low_rank": {"generic": (T, D), "basis": (R, T, D), "weights": (U, R)},
    "text": {
        "generic": (T, D), "encoder.queries": (T, D), "encoder.layer": (H, D), "encoder.bias": (T, H),
        "encoder.heads": (T, H, D),
    },
    "history": {
        "generic": (T, D), "encoder.tokens": (H, D), "encoder.votes": (H, H + 1), "encoder.layer": (H, H),
        "encoder.heads": (T, H, D),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_have_the_promised_layout(kind):
    model = _make(kind)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == LAYOUTS[kind]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert dict(model.named_buffers()) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_from_0_to_num_users_has_a_soft_prompt(kind):
    soft_prompts = _make(kind)(torch.tensor([0, U, 2, 2, 1]))
    assert soft_prompts.shape == (5, T, D)
    assert soft_prompts.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_gives_no_soft_prompt(kind):
    assert _make(kind)(torch.zeros(0, dtype=torch.int64)).shape == (0, T, D)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_user_is_the_generic_user(kind):
    soft_prompts = _make(kind)(torch.arange(U + 1))
    assert torch.equal(soft_prompts, soft_prompts[:1].expand_as(soft_prompts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [-1, U + 1])
def test_ids_out_of_range_are_refused_by_number(kind, wrong):
    with pytest.raises(ValueError, match=rf"user_ids: got \[{wrong}\], expected 0 \(generic\) to {U}"):
        _make(kind)(torch.tensor([0, 1, wrong, wrong]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("user_ids", [torch.tensor(1), torch.tensor([[1]]), torch.tensor([1.0]), torch.tensor([True])])
def test_ids_of_another_shape_or_type_are_refused(kind, user_ids):
    with pytest.raises(ValueError, match="user_ids: got .* expected \\(B,\\) torch.int64"):
        _make(kind)(user_ids)


@pytest.mark.parametrize("kind", TABLES)
def test_tables_refuse_a_context(kind):
    context = UserContext(embeds=torch.zeros(1, 1, 2, D), lengths=torch.full((1, 1), 2))
    with pytest.raises(ValueError, match="reads no context"):
        _make(kind)(torch.tensor([1]), context)


@pytest.mark.parametrize("kind", TABLES)
def test_every_parameter_has_a_gradient_in_a_batch_of_generic_rows(kind):
    """A parameter without one would stall data-parallel training on the rank that drew no known user."""
    model = _make(kind)
    model(torch.tensor([0, 0])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_restores_the_soft_prompts(kind):
    model, other = _make(kind), _make(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(_initial(*parameter.shape))
    other.load_state_dict(model.state_dict())
    user_ids = torch.arange(U + 1)
    assert torch.equal(other(user_ids), model(user_ids))


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_of_another_shape_are_refused(kind):
    with pytest.raises(ValueError, match="initial: got \\(4,\\)"):
        _make(kind).init_(torch.zeros(D))


@pytest.mark.parametrize("name", ["num_users", "num_user_tokens", "dim", "num_clusters"])
def test_a_size_below_1_is_refused_by_name(name):
    sizes = {"num_users": U, "num_user_tokens": T, "dim": D, "num_clusters": K, name: 0}
    with pytest.raises(ValueError, match=f"{name}: got 0"):
        ClusterUserModel(**sizes)


def test_making_a_user_model_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    for kind in KINDS:
        _make(kind)
    assert torch.equal(torch.random.get_rng_state(), before)
