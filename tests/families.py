"""A tiny random model of every family that prlhf serves."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 64
MAX_POSITIONS = 256

# Sizes under the names of the LLaMA line; the older families have names of their own.
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.1,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_GPT = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS, "initializer_range": 0.1}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

_CONFIGS: dict[str, dict] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": _GROUPED,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _GROUPED,
    "gpt2": {**_GPT, **_NO_DROPOUT},
    "gptj": {**_GPT, **_NO_DROPOUT, "rotary_dim": 4},
    "gpt_neox": _SIZES,
    # As OPT-350m: embeddings narrower than the blocks, and a projection on either side.
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "init_std": 0.1,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
}

FAMILIES = list(_CONFIGS)

# Experts, layers without rotary positions, and queries scaled by their place on the line, from the 64th on.
_LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "no_rope_layers": [1, 0]}
_FURTHER_CONFIGS = {
    "llama4_text": {**_GROUPED, **_LLAMA4, "floor_scale": 64, "attn_scale": 0.5},
    "cohere": {**_GROUPED, "logit_scale": 0.25},
    "falcon_h1": {
        **_GROUPED, "head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_n_groups": 1,
    },
    "phimoe": {**_GROUPED, "num_local_experts": 4},
    "granite": {**_GROUPED, "logits_scaling": 8.0},
}


def tiny_model(family: str) -> nn.Module:
    """A causal LM of `FAMILIES`, or of those besides: 2 layers, width 32, vocabulary 64, float32, every call alike."""
    special = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[family](**special, **(_CONFIGS | _FURTHER_CONFIGS)[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()
