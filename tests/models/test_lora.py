"""LoRA adapters in every family: no effect at the start, none when disabled, and the same as PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prlhf.errors import CheckpointError, ModelError
from prlhf.models.lora import (
    LoraLinear,
    adapters_disabled,
    adapters_folded,
    add_lora_,
    load_lora_state_dict_,
    lora_state_dict,
    scale_adapters_,
)
from tests.families import FAMILIES, VOCAB_SIZE, tiny_model

RANK, ALPHA = 4, 6.0

LINEAR_LAYERS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "mistral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gemma2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gemma3_text": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "gptj": {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}


def _input_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=_input_ids(), use_cache=False).logits


def _add_lora_(model: nn.Module, **settings) -> list[str]:
    return add_lora_(model, **{"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": "auto", **settings})


def _trained(family: str) -> nn.Module:
    """A tiny model whose adapters have an effect: B is random, not zero."""
    model = tiny_model(family)
    _add_lora_(model)
    generator = torch.Generator().manual_seed(2)
    state = {
        key: 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in lora_state_dict(model).items()
    }
    load_lora_state_dict_(model, state)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_wraps_every_linear_layer_of_every_block_and_nothing_else(family):
    model = tiny_model(family)
    paths = _add_lora_(model)
    assert len(paths) == 2 * len(LINEAR_LAYERS[family])
    for name in LINEAR_LAYERS[family]:
        assert sum(path.endswith(f".{name}") for path in paths) == 2, name
    assert all(isinstance(model.get_submodule(path), LoraLinear) for path in paths)
    assert not isinstance(model.get_output_embeddings(), LoraLinear)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_have_no_effect(family):
    model = tiny_model(family)
    base = _logits(model)
    _add_lora_(model)
    assert torch.equal(_logits(model), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_adapters_give_the_base_logits_bitwise(family):
    model = _trained(family)
    base = _logits(tiny_model(family))
    with_adapters = _logits(model)
    with adapters_disabled(model):
        assert torch.equal(_logits(model), base)
    assert not torch.allclose(with_adapters, base, atol=1e-3)
    assert torch.equal(_logits(model), with_adapters)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_are_trained_and_every_one_of_them(family):
    model = _trained(family)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B"}
    assert len(trained) == len(lora_state_dict(model)) == 2 * 2 * len(LINEAR_LAYERS[family])
    model(input_ids=_input_ids(), use_cache=False).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad is not None and (parameter.grad != 0).any(), name


def test_adapters_scaled_to_a_half_lie_half_way_between_base_and_trained_weights():
    model, base = _trained("llama"), tiny_model("llama")
    layer = "model.layers.0.mlp.up_proj"
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    trained, start = model.get_submodule(layer)(x), base.get_submodule(layer)(x)
    scale_adapters_(model, 0.5)
    torch.testing.assert_close(model.get_submodule(layer)(x), (trained + start) / 2)
    scale_adapters_(model, 0.0)
    assert torch.equal(_logits(model), _logits(base))


def test_adapters_come_back_after_an_error_and_after_nesting():
    model = _trained("llama")
    with_adapters = _logits(model)
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert torch.equal(_logits(model), with_adapters)
    with adapters_disabled(model):
        with adapters_disabled(model):
            pass
        assert not torch.equal(_logits(model), with_adapters)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folded_adapters_answer_alike_and_leave_no_trace(family):
    model = _trained(family)
    with_adapters, weights = _logits(model), copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), adapters_folded(model):
        layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
        assert not any(layer.enabled for layer in layers)
        torch.testing.assert_close(_logits(model), with_adapters, rtol=1e-4, atol=1e-5)
        raise KeyError
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(_logits(model), with_adapters)


def test_adapters_that_are_off_or_whose_layers_round_more_are_not_folded():
    model = _trained("llama")
    with adapters_disabled(model):
        base = _logits(model)
        with adapters_folded(model):
            assert torch.equal(_logits(model), base)
        assert torch.equal(_logits(model), base)
    rounded = _trained("llama").to(torch.bfloat16)
    expected = _logits(rounded)
    with adapters_folded(rounded):
        assert torch.equal(_logits(rounded), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_is_its_base_plus_the_scaled_low_rank_product(family):
    """alpha / rank = 1.5: y = W x + b + 1.5 B A x, with W stored (out, in), transposed in GPT-2's Conv1D."""
    model = _trained(family)
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    x = torch.randn(5, layer.lora_A.shape[1], generator=torch.Generator().manual_seed(3))
    weight = layer.base.weight.T if family == "gpt2" else layer.base.weight
    bias = 0.0 if layer.base.bias is None else layer.base.bias
    expected = x @ (weight + 1.5 * layer.lora_B @ layer.lora_A).T + bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_has_the_gradients_of_that_sum(family, dropout, autocast):
    model = _trained(family)
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    layer.dropout = nn.Dropout(dropout).train()
    x = torch.randn(2, 5, layer.lora_A.shape[1], generator=torch.Generator().manual_seed(3), requires_grad=True)
    leaves = [x, layer.lora_A, layer.lora_B]
    weight = (layer.base.weight.T if family == "gpt2" else layer.base.weight).detach()
    bias = 0.0 if layer.base.bias is None else layer.base.bias.detach()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(x)
        torch.manual_seed(5)
        dropped = layer.dropout(x)
    expected = x @ weight.T + bias + 1.5 * dropped @ layer.lora_A.T @ layer.lora_B.T
    assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    wanted = (expected, *torch.autograd.grad(expected, leaves, upstream))
    got = (output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype)))
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= (1e-2 if autocast else 1e-6) * other.norm()
    assert all(one.dtype == torch.float32 for one in got[1:])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_has_its_gradient_where_the_inputs_need_none(dropout):
    layer = next(module for module in _trained("llama").modules() if isinstance(module, LoraLinear))
    layer.dropout = nn.Dropout(dropout)
    x = torch.randn(3, layer.lora_A.shape[1], generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    dropped = layer.dropout(x)
    wanted = torch.autograd.grad(
        (x @ layer.base.weight.T + 1.5 * dropped @ layer.lora_A.T @ layer.lora_B.T).sum(), [layer.lora_A, layer.lora_B]
    )
    torch.manual_seed(4)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), [layer.lora_A, layer.lora_B]), wanted)


@pytest.mark.parametrize("lead", [(3,), (2, 3)])
def test_what_a_layer_gives_can_be_changed_in_place(lead):
    """As OLMo does, which clips queries, keys and values right after their projections."""
    layer = next(module for module in _trained("llama").modules() if isinstance(module, LoraLinear))
    x = torch.randn(*lead, layer.lora_A.shape[1], generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad(layer(x).clamp(-0.1, 0.1).sum(), layer.lora_B)
    torch.testing.assert_close(torch.autograd.grad(layer(x).clamp_(-0.1, 0.1).sum(), layer.lora_B), expected)


def test_backward_under_autocast_is_that_of_the_forward_pass():
    layer = next(module for module in _trained("llama").modules() if isinstance(module, LoraLinear))
    x = torch.randn(3, layer.lora_A.shape[1], generator=torch.Generator().manual_seed(3), requires_grad=True)
    leaves = [x, layer.lora_A, layer.lora_B]
    expected = torch.autograd.grad(layer(x).sum(), leaves)
    output = layer(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(output, leaves)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_second_derivatives_are_refused_and_a_base_that_is_trained_has_its_gradient():
    layer = next(module for module in _trained("llama").modules() if isinstance(module, LoraLinear))
    x = torch.randn(3, layer.lora_A.shape[1], generator=torch.Generator().manual_seed(3))
    (slope,) = torch.autograd.grad(layer(x).square().sum(), layer.lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
    layer.base.weight.requires_grad_(True)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).sum(), layer.base.weight)[0], x.sum(0).expand_as(layer.base.weight)
    )


class _Halves(nn.Linear):
    """A layer whose weight is not what it multiplies with, as quantised ones have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def test_a_layer_of_another_kind_computes_in_its_own_way():
    generator = torch.Generator().manual_seed(0)
    layer = LoraLinear(_Halves(6, 4), rank=2, alpha=2.0, dropout=0.0, generator=generator)
    nn.init.ones_(layer.lora_B)
    x = torch.randn(3, 6, generator=generator)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ layer.lora_A.T @ layer.lora_B.T)


def test_adapters_of_a_bfloat16_backbone_are_float32_and_answer_in_bfloat16():
    model = tiny_model("llama").to(torch.bfloat16)
    base = _logits(model)
    _add_lora_(model)
    assert {tensor.dtype for tensor in lora_state_dict(model).values()} == {torch.float32}
    assert _logits(model).dtype == torch.bfloat16
    assert torch.equal(_logits(model), base)


def test_dropout_acts_in_training_alone():
    model = tiny_model("llama")
    _add_lora_(model, dropout=0.5)
    load_lora_state_dict_(model, lora_state_dict(_trained("llama")))
    torch.testing.assert_close(_logits(model), _logits(_trained("llama")), rtol=0, atol=0)
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(_logits(model.train()), _logits(model.eval()))


def test_the_draw_depends_on_the_seed_alone():
    def draw(seed: int) -> dict[str, torch.Tensor]:
        model = tiny_model("llama")
        _add_lora_(model, seed=seed)
        return lora_state_dict(model)

    before = torch.random.get_rng_state()
    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    drawn = [key for key in first if ".lora_A." in key]
    assert drawn
    assert all(torch.equal(first[key], again[key]) for key in drawn)
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


def test_a_is_uniform_within_the_inverse_root_of_its_inputs():
    """kaiming_uniform with a = sqrt 5: bound = sqrt(2 / (1 + 5)) sqrt(3 / in) = 1 / sqrt(in); B is zero."""
    layer = LoraLinear(nn.Linear(400, 3), rank=50, alpha=1.0, dropout=0.0, generator=torch.Generator().manual_seed(0))
    assert 0.049 < layer.lora_A.abs().max().item() <= 0.05
    # 20,000 draws: the standard deviation is 0.05 / sqrt 3 within 2%.
    assert layer.lora_A.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert torch.equal(layer.lora_B, torch.zeros(3, 50))


def test_named_targets_match_the_last_parts_of_a_path():
    paths = _add_lora_(tiny_model("llama"), targets=("q_proj", "mlp.down_proj", "model.layers.1.self_attn.v_proj"))
    assert paths == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_targets_that_name_no_layer_are_all_refused_and_the_backbone_is_left_alone():
    model = tiny_model("llama")
    with pytest.raises(ModelError) as error:
        _add_lora_(model, targets=("proj", "q_proj", "c_attn"))
    assert [message.split(" names")[0] for message in error.value.messages] == [
        "lora.targets: 'proj'",
        "lora.targets: 'c_attn'",
    ]
    assert "q_proj" in error.value.messages[0]
    assert lora_state_dict(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ModelError, match="got no name"):
        _add_lora_(model, targets=())


def test_auto_refuses_a_model_without_blocks():
    with pytest.raises(ModelError, match="'auto' found no linear layer"):
        _add_lora_(nn.Sequential(nn.Linear(2, 2)))


def test_a_second_set_of_adapters_is_refused():
    with pytest.raises(ModelError, match="has LoRA adapters already"):
        _add_lora_(_trained("llama"))


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("dropout", 1.0), ("dropout", -0.1)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"lora.{name}: got {value}"):
        _add_lora_(tiny_model("llama"), **{name: value})


def test_state_dict_restores_the_logits():
    model, trained = tiny_model("gpt2"), _trained("gpt2")
    _add_lora_(model)
    load_lora_state_dict_(model, lora_state_dict(trained))
    assert torch.equal(_logits(model), _logits(trained))


def test_a_state_that_does_not_fit_is_refused_whole():
    model = _trained("llama")
    before = _logits(model)
    state = {key: torch.zeros_like(tensor) for key, tensor in lora_state_dict(model).items()}
    missing = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    resized = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    del state[missing]
    state[resized] = torch.zeros(1, 1)
    state["model.stray"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        load_lora_state_dict_(model, state)
    assert [message.split(";")[0] for message in error.value.messages] == [
        f"{missing}: missing",
        f"{resized}: got (1, 1), expected (48, 4)",
        "model.stray: unexpected",
    ]
    assert torch.equal(_logits(model), before)


def _peft_model(family: str, targets: str | list[str]) -> nn.Module:
    import peft

    is_transposed = family == "gpt2"
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=is_transposed
    )
    with torch.random.fork_rng(devices=[]):
        return peft.get_peft_model(tiny_model(family), config).eval()


@pytest.mark.peer("peft")
@pytest.mark.parametrize("family", FAMILIES)
def test_key_names_and_shapes_are_those_of_peft(family):
    """PEFT's own choice of all linear layers but the output one; it adds OPT's projections outside the blocks."""
    import peft

    theirs = peft.get_peft_model_state_dict(_peft_model(family, "all-linear"))
    expected = {key: tensor.shape for key, tensor in theirs.items() if ".project_" not in key}
    assert {key: tensor.shape for key, tensor in lora_state_dict(_trained(family)).items()} == expected


@pytest.mark.peer("peft")
@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_loads_into_peft_and_gives_the_same_logits(family):
    import peft

    model = tiny_model(family)
    paths = _add_lora_(model)
    ours = _trained(family)
    theirs = _peft_model(family, paths)
    base = _logits(theirs)
    result = peft.set_peft_model_state_dict(theirs, copy.deepcopy(lora_state_dict(ours)))
    assert result.unexpected_keys == []
    # Two programs, one formula in float32: the order of a few operations differs.
    torch.testing.assert_close(_logits(theirs), _logits(ours), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(_logits(theirs), base, atol=1e-3)


def test_the_output_layer_takes_no_adapter():
    """It computes response tokens alone, and tied to the embeddings it could not be merged."""
    backbone = tiny_model("llama")
    with pytest.raises(ModelError, match="'lm_head' names the output layer"):
        add_lora_(backbone, rank=2, alpha=4, dropout=0.0, targets=["q_proj", "lm_head"])
    assert all(parameter.requires_grad for parameter in backbone.parameters())
