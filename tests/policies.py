"""Tiny random policies of every family, and rows for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prlhf.data.collate import PairBatch, collate_pairs
from prlhf.data.tokenize import TokenizedPair
from prlhf.data.user_index import UserIndex
from prlhf.models.backbone import embedding_dim, save_backbone
from prlhf.models.head import find_head
from prlhf.models.lora import add_lora_
from prlhf.models.policy import PersonalizedPolicy
from prlhf.usermodel import IndividualUserModel
from tests.families import MAX_POSITIONS, tiny_model
from tests.tokenizers import tiny_tokenizer

NUM_USER_TOKENS = 3
FIRST_ORDINARY_TOKEN = 3


def tiny_backbone(family: str, tokenizer: Any, *, seed: int = 0, positions: int = MAX_POSITIONS) -> nn.Module:
    """`tiny_model` with the tokenizer's vocabulary and special tokens."""
    config = copy.deepcopy(tiny_model(family).config)
    config.max_position_embeddings = positions
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def tiny_policy(
    family: str = "llama", *, variant: str = "plain", num_users: int = 2, lora: bool = False
) -> PersonalizedPolicy:
    """A policy of users "u1", "u2", ... whose soft prompts are random and strong; no users for `num_users` 0."""
    tokenizer = tiny_tokenizer(variant)
    backbone = tiny_backbone(family, tokenizer)
    dim = embedding_dim(backbone)
    encoder = None
    if num_users:
        encoder = IndividualUserModel(num_users=num_users, num_user_tokens=NUM_USER_TOKENS, dim=dim)
    policy = PersonalizedPolicy(
        backbone, tokenizer, user_encoder=encoder, users=UserIndex([f"u{i + 1}" for i in range(num_users)])
    )
    policy.head = find_head(backbone)
    if lora:
        add_lora_(backbone, rank=2, alpha=4.0, dropout=0.0, targets="auto")
    if encoder is not None:
        randomize_(encoder, scale=1.0)
    return policy.eval()


@torch.no_grad()
def randomize_(module: nn.Module, *, scale: float) -> None:
    """Add normal noise to what is trained."""
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def make_row(policy: PersonalizedPolicy, row: int, *, user_id: int, lengths: tuple[int, int, int]) -> TokenizedPair:
    """A row of random tokens: lengths of prompt (BOS not counted), chosen and rejected."""
    generator = torch.Generator().manual_seed(100 + row)
    vocab_size = len(policy.tokenizer)
    prompt, chosen, rejected = (
        tuple(torch.randint(FIRST_ORDINARY_TOKEN, vocab_size, (length,), generator=generator).tolist())
        for length in lengths
    )
    bos = () if policy.tokenizer.bos_token_id is None else (policy.tokenizer.bos_token_id,)
    return TokenizedPair(row, user_id, bos + prompt, chosen, rejected)


def make_rows(policy: PersonalizedPolicy) -> list[TokenizedPair]:
    """Four ragged rows of users 1, 0, 2, 1; some are longer than the sliding window of the Gemma families (16)."""
    lengths = [(4, 3, 9), (30, 21, 2), (11, 1, 5), (2, 40, 17)]
    return [make_row(policy, i, user_id=user, lengths=lengths[i]) for i, user in enumerate((1, 0, 2, 1))]


def make_batch(policy: PersonalizedPolicy, rows: list[TokenizedPair] | None = None) -> PairBatch:
    return collate_pairs(make_rows(policy) if rows is None else rows, pad_id=policy.tokenizer.pad_token_id or 0)


@torch.no_grad()
def plain_logps(model: nn.Module, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> Tensor:
    """Log-prob of each response token from the model's own ids in, logits out: neither batch nor embeddings."""
    logits = model(input_ids=torch.tensor([[*prompt_ids, *response_ids]]), use_cache=False).logits[0].double()
    scores = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return scores.gather(1, torch.tensor(response_ids)[:, None])[:, 0]


def save_folder(
    folder: Path, *, family: str = "llama", variant: str = "plain", seed: int = 0, positions: int = MAX_POSITIONS
) -> str:
    """A transformers folder of a tiny model in float32."""
    tokenizer = tiny_tokenizer(variant)
    backbone = tiny_backbone(family, tokenizer, seed=seed, positions=positions)
    save_backbone(backbone, tokenizer, folder, dtype="float32")
    return str(folder)


def give_longrope_(folder: Path, original_positions: int) -> str:
    """Make a saved model's rotary frequencies those of a call: others for all rows once one is longer than that."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    dim = config["hidden_size"] // config["num_attention_heads"] // 2
    factors = {"short_factor": [1.0] * dim, "long_factor": [4.0] * dim, "factor": 8.0}
    config["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    config["original_max_position_embeddings"] = original_positions
    path.write_text(json.dumps(config))
    return str(folder)
