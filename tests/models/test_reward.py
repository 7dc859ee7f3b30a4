"""The reward model's scores: a linear function of the plain model's last hidden state, whatever stands beside a row."""

from __future__ import annotations

import pytest
import torch

from prlhf.data.collate import collate_pairs
from prlhf.models.backbone import embedding_dim, input_embedding
from prlhf.models.lora import add_lora_
from prlhf.models.reward import PersonalizedRewardModel
from prlhf.usermodel import IndividualUserModel
from tests.families import FAMILIES
from tests.policies import NUM_USER_TOKENS, make_rows, randomize_, tiny_backbone
from tests.tokenizers import tiny_tokenizer

# Relative to the size of the scores, which the random head makes about 1: float32 sums in another order.
TOLERANCE = 1e-5


def reward_model(family: str = "llama", *, lora: bool = False, variant: str = "plain") -> PersonalizedRewardModel:
    """A reward model of two users with a random head and random soft prompts."""
    tokenizer = tiny_tokenizer(variant)
    backbone = tiny_backbone(family, tokenizer)
    encoder = IndividualUserModel(num_users=2, num_user_tokens=NUM_USER_TOKENS, dim=embedding_dim(backbone))
    model = PersonalizedRewardModel(backbone, tokenizer, user_encoder=encoder)
    if lora:
        add_lora_(backbone, rank=2, alpha=4.0, dropout=0.0, targets="auto")
    randomize_(model.score, scale=0.3)
    randomize_(encoder, scale=1.0)
    return model.eval()


@torch.no_grad()
def plain_score(model: PersonalizedRewardModel, ids: tuple[int, ...], user_id: int | None) -> float:
    """From one unpadded sequence and the last hidden state that transformers reports."""
    embeds = input_embedding(model.backbone)(torch.tensor([ids]))
    if user_id is not None:
        embeds = torch.cat([embeds[:, :1], model.user_encoder(torch.tensor([user_id])), embeds[:, 1:]], dim=1)
    hidden = model.backbone.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return float(hidden[0, -1] @ model.score.weight[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_users", [True, False])
def test_scores_are_those_of_each_sequence_alone(family: str, with_users: bool) -> None:
    model = reward_model(family)
    rows = make_rows(model)
    batch = collate_pairs(rows, pad_id=0)
    with torch.no_grad():
        scores = model.scores(batch, batch.user_ids if with_users else None)
    for i, row in enumerate(rows):
        user_id = row.user_id if with_users else None
        chosen = plain_score(model, row.prompt_ids + row.chosen_ids, user_id)
        rejected = plain_score(model, row.prompt_ids + row.rejected_ids, user_id)
        assert scores.chosen[i].item() == pytest.approx(chosen, abs=TOLERANCE)
        assert scores.rejected[i].item() == pytest.approx(rejected, abs=TOLERANCE)


def test_a_new_reward_model_scores_everything_0() -> None:
    model = reward_model()
    torch.nn.init.zeros_(model.score.weight)
    batch = collate_pairs(make_rows(model), pad_id=0)
    scores = model.scores(batch, batch.user_ids)
    assert torch.equal(scores.chosen, torch.zeros(4)) and torch.equal(scores.rejected, torch.zeros(4))


def test_a_row_has_no_gradient_in_another_users_soft_prompt() -> None:
    model = reward_model()
    batch = collate_pairs([row for row in make_rows(model) if row.user_id == 1], pad_id=0)
    model.scores(batch, batch.user_ids).chosen.sum().backward()
    assert (model.user_encoder.offsets.grad[0] != 0).any()
    assert torch.equal(model.user_encoder.offsets.grad[1], torch.zeros_like(model.user_encoder.offsets.grad[1]))


def test_scores_stay_float32_under_bf16() -> None:
    model = reward_model(lora=True)
    batch = collate_pairs(make_rows(model), pad_id=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.scores(batch, batch.user_ids).chosen.dtype == torch.float32
