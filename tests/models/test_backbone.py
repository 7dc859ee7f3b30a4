"""Loading of backbones: what is written comes back, and what cannot be trained is refused in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from prlhf.data.records import Message, ResponseRow
from prlhf.data.tokenize import encode_prompt, render_prompt
from prlhf.data.world.psoups import build_psoups
from prlhf.data.world.tokenizer import CHAT_TEMPLATE
from prlhf.errors import ModelError
from prlhf.models import backbone
from prlhf.models.backbone import (
    BUILTIN_SCRATCH,
    BUILTIN_TINY,
    builtin_model_dir,
    changed_architecture,
    describe_architecture,
    embedding_dim,
    hash_state,
    load_backbone,
    load_tokenizer,
    pad_token_id,
    position_limit,
    save_backbone,
)
from tests.families import FAMILIES, MAX_POSITIONS, tiny_model
from tests.policies import save_folder, tiny_backbone
from tests.tokenizers import SENTENCES, tiny_tokenizer

IDS = torch.tensor([[0, 9, 40, 5, 17]])


def _refusal(name: object) -> str:
    with pytest.raises(ModelError) as error:
        load_backbone(str(name))
    assert len(error.value.messages) == 1 and "\n" not in error.value.messages[0]
    assert error.value.messages[0].startswith(f"model.backbone '{name}': ")
    return error.value.messages[0]


def _change_weights(folder: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = Path(folder) / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def _change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformers_folder_comes_back_bitwise(family, tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_backbone(family, tokenizer)
    save_backbone(model, tokenizer, tmp_path, dtype="float32")
    loaded, loaded_tokenizer = load_backbone(str(tmp_path))
    assert not loaded.training
    assert hash_state(loaded) == hash_state(model)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    text = "Bees dance. <eos>"
    assert loaded_tokenizer.encode(text, split_special_tokens=True) == tokenizer.encode(text, split_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_position_limit_and_width_are_read_from_any_family(family):
    model = tiny_backbone(family, tiny_tokenizer())
    assert position_limit(model) == MAX_POSITIONS
    assert embedding_dim(model) == (16 if family == "opt" else 32)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_a_folder_with_dropout_computes_the_same_in_training(family, tmp_path):
    folder = save_folder(tmp_path, family=family)
    names = [name for name in AutoConfig.from_pretrained(folder).to_dict() if "drop" in name]
    assert names
    _change_json(tmp_path / "config.json", **dict.fromkeys(names, 0.5))
    model, _ = load_backbone(folder)
    expected = model(input_ids=IDS).logits
    assert torch.equal(model.train()(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(("family", "is_random"), [("phimoe", True), ("llama", False)])
def test_a_family_that_draws_while_it_is_trained_is_said(family, is_random, tmp_path, caplog):
    load_backbone(save_folder(tmp_path, family=family))
    assert ("random numbers in training" in caplog.text) == is_random


def test_weights_are_loaded_in_the_type_asked_for(tmp_path):
    folder = save_folder(tmp_path)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model, _ = load_backbone(folder, dtype=name)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_saving_in_half_precision_leaves_the_model_as_it_is(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_backbone("llama", tokenizer)
    before = hash_state(model)
    save_backbone(model, tokenizer, tmp_path)
    assert hash_state(model) == before
    stored = load_file(tmp_path / "model.safetensors")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], weight.bfloat16())


def _hash_of(name: str, tensor: torch.Tensor) -> str:
    module = torch.nn.Module()
    module.register_buffer(name, tensor)
    return hash_state(module)


def test_the_hash_sees_names_types_shapes_and_every_bit():
    """The first four hold the same 24 bytes; the last differs in one bit of them."""
    zeros = torch.zeros(2, 3)
    one_bit = zeros.clone()
    one_bit[1, 2] = torch.nextafter(torch.tensor(0.0), torch.tensor(1.0))
    hashes = [
        _hash_of("a", zeros),
        _hash_of("b", zeros),
        _hash_of("a", zeros.view(3, 2)),
        _hash_of("a", zeros.int()),
        _hash_of("a", one_bit),
    ]
    assert len(set(hashes)) == 5
    assert _hash_of("a", torch.zeros(3, 2).view(2, 3)) == hashes[0]


@pytest.mark.parametrize(("variant", "expected"), [("plain", 2), ("pad_is_eos", 1), ("no_pad", 1)])
def test_eos_pads_where_no_pad_exists(variant, expected):
    assert pad_token_id(tiny_tokenizer(variant)) == expected


def test_scratch_weights_follow_the_seed_and_nobody_elses_random_state(monkeypatch):
    # The tokenizer of the whole built-in text takes seconds.
    monkeypatch.setattr(backbone, "build_text", lambda seed: ([ResponseRow("Tea?", text) for text in SENTENCES], []))
    before = torch.random.get_rng_state()
    first, tokenizer = load_backbone(BUILTIN_SCRATCH, seed=1)
    again, _ = load_backbone(BUILTIN_SCRATCH, seed=1)
    other, _ = load_backbone(BUILTIN_SCRATCH, seed=2)
    assert hash_state(first) == hash_state(again) != hash_state(other)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not first.training and position_limit(first) >= 1024
    assert first.get_input_embeddings().num_embeddings == len(tokenizer)
    assert [first.config.bos_token_id, first.config.eos_token_id] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_one_question_reads_to_the_builtin_model_as_in_its_pretraining_text():
    """The ids of the prompt and a newline behind BOS, as without a chat template; names of special tokens too."""
    tokenizer = load_tokenizer(builtin_model_dir(), BUILTIN_TINY)
    prompts = {row.prompt for row in build_psoups(0).eval_seen} | {"What is <eos>?", " Two\n\nlines ", "<bos>"}
    assert tokenizer.chat_template == CHAT_TEMPLATE
    for prompt in prompts:
        plain = tokenizer.encode(f"{prompt}\n", add_special_tokens=False, split_special_tokens=True)
        assert encode_prompt(tokenizer, prompt, max_prompt_tokens=100) == [tokenizer.bos_token_id, *plain]
        with_text = tokenizer.encode(f"I am six.\n{prompt}\n", add_special_tokens=False, split_special_tokens=True)
        ids = encode_prompt(tokenizer, prompt, "I am six.", max_prompt_tokens=100)
        assert ids == [tokenizer.bos_token_id, *with_text]


def test_earlier_turns_stand_in_front_in_plain_text_for_the_builtin_model():
    tokenizer = load_tokenizer(builtin_model_dir(), BUILTIN_TINY)
    turns = (Message("user", "What are bones?"), Message("assistant", "They hold us up."), Message("user", "And skin?"))
    expected = "I am six.\nWhat are bones?\nThey hold us up.\nAnd skin?\n"
    assert render_prompt(tokenizer, turns, "I am six.") == expected


def test_a_missing_folder_and_an_unknown_builtin_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no supervised model was trained
    assert "no folder" in _refusal(tmp_path / "nothing")
    assert "no folder gpt2" in _refusal("gpt2")
    for world in ("tldr", "prism"):
        assert f"`make train EXP={world}` trains it first" in _refusal(f"runs/builtin_{world}/model")
    assert "builtin:tiny or builtin:scratch" in _refusal("builtin:large")


def test_a_folder_without_config_is_refused(tmp_path):
    assert "has no config.json" in _refusal(tmp_path)


def test_a_hub_id_that_cannot_be_fetched_is_refused():
    """The tests have no network; what the hub's client says of that is its own affair."""
    assert "cannot be loaded" in _refusal("nobody/nothing")


def test_a_broken_config_or_weights_file_is_refused(tmp_path):
    folder = Path(save_folder(tmp_path))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cannot be loaded as a causal language model" in _refusal(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{")
    assert "cannot be loaded as a causal language model" in _refusal(folder)


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=300)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "cannot be loaded as a causal language model" in _refusal(tmp_path)


def test_an_encoder_is_refused_though_transformers_loads_it_as_a_causal_model(tmp_path):
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=300,
        initializer_range=0.3,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "its tokens see those that follow (model_type bert)" in _refusal(tmp_path)


def test_missing_and_broken_weights_are_refused_by_name(tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    without = save_folder(tmp_path / "without")
    _change_weights(without, lambda state: state.pop(key))
    assert f"no weights for {key}; restore" in _refusal(without)
    broken = save_folder(tmp_path / "broken")
    _change_weights(broken, lambda state: state[key][0].fill_(float("nan")))
    assert f"NaN or infinity in {key}; restore" in _refusal(broken)


def test_a_tokenizer_that_is_missing_or_never_ends_is_refused(tmp_path):
    without = Path(save_folder(tmp_path / "without"))
    for path in without.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in _refusal(without)
    endless = Path(save_folder(tmp_path / "endless"))
    _change_json(endless / "tokenizer_config.json", eos_token=None)
    assert "no EOS token" in _refusal(endless)


def test_code_in_a_folder_is_never_run(tmp_path):
    folder = Path(save_folder(tmp_path / "model"))
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Model: pass\nclass Config: pass\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    _change_json(folder / "config.json", auto_map=auto_map, model_type="evil")
    assert "cannot be loaded as a causal language model" in _refusal(folder)
    assert not canary.exists()


class _Evil:
    """What a pickle can do to whoever opens it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def test_pickled_weights_are_never_opened(tmp_path):
    folder = Path(save_folder(tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.embed_tokens.weight": _Evil(canary)}))
    assert "safetensors" in _refusal(folder)
    assert not canary.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())["model.embed_tokens.weight"].close()
    assert canary.exists(), "the pickle does no harm: nothing was tested"


def test_architectures_are_compared_where_one_version_of_transformers_wrote_both():
    described = describe_architecture(tiny_model("llama"))
    assert json.loads(json.dumps(described)) == described
    assert changed_architecture(described, described) == [] == changed_architecture({}, described)
    other = {**described, "rms_norm_eps": 0.5}
    assert changed_architecture(other, described) == [f"rms_norm_eps: 0.5, now {described['rms_norm_eps']}"]
    assert changed_architecture({**other, "transformers": "0"}, described) == []
