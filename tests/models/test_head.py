"""Log-probs under a backbone's head are those of its own logits, which never exist for all tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from prlhf.data.collate import collate_responses
from prlhf.data.tokenize import TokenizedResponse
from prlhf.losses.token_logps import CHUNK_TOKENS
from prlhf.models.head import Head, find_head
from prlhf.models.packing import Packing, set_up_packing_
from prlhf.models.policy import PersonalizedPolicy
from tests.families import FAMILIES, tiny_model
from tests.largest_tensor import LargestTensor
from tests.policies import make_batch, make_rows, plain_logps, tiny_policy
from tests.tokenizers import tiny_tokenizer

HEADS = {"gemma2": Head(softcap=30.0), "cohere": Head(scale=0.25), "granite": Head(scale=0.125)}
ALL_FAMILIES = [*FAMILIES, "cohere", "granite", "llama4_text"]


def _let_it_pack_(policy: PersonalizedPolicy) -> bool:
    packing = set_up_packing_(policy.backbone)
    policy.packing = packing if isinstance(packing, Packing) else None
    return policy.packing is not None


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_head_of_every_family_is_known(family):
    assert find_head(tiny_model(family)) == HEADS.get(family, Head())


@pytest.mark.parametrize("packed", [True, False], ids=["packed where it can be", "padded"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_no_family_makes_logits_of_its_own_to_score_rows(family, packed):
    policy = tiny_policy(family)
    if packed:
        assert _let_it_pack_(policy) is (family not in ("gemma2", "gptj", "llama4_text"))
    rows = make_rows(policy)
    expected = [plain_logps(policy.backbone, row.prompt_ids, row.chosen_ids) for row in rows]
    policy.backbone.get_output_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("logits were made"))
    logps = policy.logps(make_batch(policy, rows), None)
    for value, tokens in zip(logps.chosen, expected, strict=True):
        assert value.item() == pytest.approx(tokens.sum().item(), abs=1e-5 * len(tokens))


@pytest.mark.parametrize(("family", "key", "value", "head"), [
    ("gemma2", "final_logit_softcapping", 0.5, Head(softcap=0.5)),
    ("cohere", "logit_scale", 3.0, Head(scale=3.0)),
    ("granite", "logits_scaling", 0.25, Head(scale=4.0)),
])
def test_a_strong_cap_or_scale_gives_the_gradients_of_the_models_own_logits(family, key, value, head):
    config = copy.deepcopy(tiny_policy(family).backbone.config)
    setattr(config, key, value)
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    policy = PersonalizedPolicy(backbone, tiny_tokenizer())
    batch, gradients = make_batch(policy), []
    assert find_head(backbone) == head
    for policy.head in (head, None):
        values, _ = policy.padded_values(batch, None)
        found = torch.autograd.grad((values * torch.linspace(1, 2, len(values))).sum(), list(backbone.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_a_head_that_is_not_what_its_settings_say_is_left_to_the_backbone():
    policy = tiny_policy()
    policy.backbone.config.logit_scale = 2.0
    assert find_head(policy.backbone) is None


def test_a_family_that_cannot_be_tried_keeps_its_own_logits():
    backbone = tiny_policy().backbone
    backbone.model.forward = lambda **_: None
    assert find_head(backbone) is None


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_of_a_vocabulary_of_256_000_a_policy_makes_no_more_logits_than_a_chunk_has(family):
    """Gemma 2 pads its rows and caps its logits, Llama packs."""
    vocab = 256_000
    config = copy.deepcopy(tiny_model(family).config)
    config.vocab_size, config.hidden_size, config.intermediate_size = vocab, 8, 8
    config.head_dim, config.num_attention_heads, config.num_key_value_heads = 4, 2, 2
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    backbone.model.layers[0].requires_grad_(True)
    policy = PersonalizedPolicy(backbone.eval(), tiny_tokenizer())
    policy.head = find_head(backbone)
    assert _let_it_pack_(policy) is (family == "llama")
    row = [torch.randint(3, vocab, (length,)).tolist() for length in (8, 6, 70)]
    rows = [TokenizedResponse(i, 0, (0, *row[i]), tuple(row[2])) for i in range(2)]
    with LargestTensor() as largest:
        policy.sequence_logps(collate_responses(rows, pad_id=2), None)[0].sum().backward()
    assert largest.numel == CHUNK_TOKENS * vocab
    assert backbone.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
