"""Packed rows give what padded rows give, in every family that can read them, and the others say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prlhf.data.collate import ResponseTree, collate_responses, collate_trees
from prlhf.data.tokenize import TokenizedPair, TokenizedResponse
from prlhf.models import packing
from prlhf.models.head import Head, find_head
from prlhf.models.packing import Packing, Term, make_pack, set_up_packing_
from prlhf.models.policy import PersonalizedPolicy
from prlhf.models.reward import PersonalizedRewardModel
from tests.families import FAMILIES
from tests.policies import (
    FIRST_ORDINARY_TOKEN,
    NUM_USER_TOKENS,
    make_batch,
    make_row,
    make_rows,
    randomize_,
    tiny_policy,
)

PER_TOKEN = 1e-5  # nats; float32 sums in another order
RELATIVE = 1e-6  # of a sequence's log-prob, likewise; two units in the last place are 1.2e-7 to 2.4e-7
PADDED_FAMILIES = {"gemma2": "softcap", "gptj": "off by"}
PACKED_FAMILIES = [family for family in FAMILIES if family not in PADDED_FAMILIES]


def _packed_policy(family: str = "llama", **options) -> PersonalizedPolicy:
    policy = tiny_policy(family, **options)
    packing = set_up_packing_(policy.backbone)
    assert isinstance(packing, Packing)
    # Rows longer than the window are another test's.
    changes = {"window": None} if packing.window is None or packing.window > 100 else {}
    policy.packing = dataclasses.replace(packing, **changes)
    return policy


def _policy_of(family: str, **options) -> PersonalizedPolicy:
    """Packed where the family can."""
    return _packed_policy(family, **options) if family in PACKED_FAMILIES else tiny_policy(family, **options)


def _short_rows(policy: PersonalizedPolicy) -> list[TokenizedPair]:
    """Within the 16 positions of the tiny Gemma's window, soft prompt and BOS included."""
    lengths = [(4, 3, 8), (6, 5, 2), (3, 1, 5), (2, 9, 7)]
    return [make_row(policy, i, user_id=user, lengths=lengths[i]) for i, user in enumerate((1, 0, 2, 1))]


def _rows(policy: PersonalizedPolicy, family: str) -> list[TokenizedPair]:
    return _short_rows(policy) if family == "gemma3_text" else make_rows(policy)


def _both_terms(policy: PersonalizedPolicy, batch) -> list[tuple[Tensor, Tensor]]:
    """As the rows' users and as the generic user, in one pass."""
    generic = Term(torch.zeros_like(batch.user_ids), None, shared=True)
    return policy.term_values(batch, [Term(batch.user_ids, batch.context, shared=False), generic])


def _both(policy: PersonalizedPolicy, batch) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Both terms, packed and padded."""
    generic = torch.zeros_like(batch.user_ids)
    return _both_terms(policy, batch), [policy.padded_values(batch, ids) for ids in (batch.user_ids, generic)]


def _gradient(policy: PersonalizedPolicy, terms: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """All trained tensors' gradients in one vector, of a loss that weighs every sequence differently."""
    loss = sum((values * torch.linspace(1, 2, len(values))).sum() for values, _ in terms)
    gradients = torch.autograd.grad(loss, list(policy.trainable().values()), allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


@pytest.mark.parametrize("own_head", [True, False], ids=["own head", "logits"])
@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_log_probs_and_gradients_are_those_of_padded_rows(family, own_head):
    policy = _packed_policy(family)
    batch = make_batch(policy, _rows(policy, family))
    packed, _ = _both(policy, batch) if own_head else ([], None)
    policy.head = None
    logits_packed, padded = _both(policy, batch)
    packed = packed or logits_packed
    for (values, tokens), (expected, expected_tokens) in zip(packed, padded, strict=True):
        assert torch.equal(tokens, expected_tokens)
        assert ((values - expected).abs() / tokens).max() < PER_TOKEN
    gradient, reference = _gradient(policy, packed), _gradient(policy, padded)
    assert (gradient - reference).norm() < 1e-5 * reference.norm()


def _one_by_one(policy: PersonalizedPolicy, rows: list[TokenizedPair], users: list[int]) -> Tensor:
    """Log-prob of each row's chosen response, then of each rejected one, every sequence in a call of its own."""
    values = []
    for side in ("chosen_ids", "rejected_ids"):
        for row, user in zip(rows, users, strict=True):
            batch = collate_responses([TokenizedResponse(0, user, row.prompt_ids, getattr(row, side))], pad_id=2)
            values.append(policy.padded_values(batch, batch.user_ids)[0])
    return torch.cat(values)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_batch_the_log_probs_and_gradients_of_its_sequences_one_by_one(family, lora):
    """Padded, and packed where the family can; both terms."""
    policy = _policy_of(family, lora=lora)
    randomize_(policy, scale=0.1)
    rows = _rows(policy, family)
    terms, padded = _both(policy, make_batch(policy, rows))
    alone = [_one_by_one(policy, rows, users) for users in ([row.user_id for row in rows], [0] * len(rows))]
    for either in (terms, padded):
        for (values, tokens), expected in zip(either, alone, strict=True):
            assert ((values - expected).abs() / tokens).max() < PER_TOKEN
            torch.testing.assert_close(values, expected, rtol=RELATIVE, atol=0)
    gradient, reference = _gradient(policy, terms), _gradient(policy, [(values, None) for values in alone])
    assert (gradient - reference).norm() < 1e-4 * reference.norm()


@pytest.mark.parametrize("family", PADDED_FAMILIES)
def test_a_family_that_cannot_read_packs_says_why_and_stays_as_it_was(family):
    policy = tiny_policy(family)
    before = policy.backbone.config._attn_implementation
    batch = make_batch(policy)
    expected, _ = policy.padded_values(batch, None)
    assert PADDED_FAMILIES[family] in set_up_packing_(policy.backbone)
    assert policy.backbone.config._attn_implementation == before
    assert torch.equal(policy.padded_values(batch, None)[0], expected)


# Recurrent and convolutional layers, which hand a little of one row on to the next.
_MIXED = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_n_groups": 1},
    "minimax": {"num_local_experts": 4},
}
_SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 2, "bos_token_id": 0,
    "eos_token_id": 1,
}


def _random_model(family: str, dtype: torch.dtype, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**_SIZES, **sizes), dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", _MIXED)
def test_a_family_whose_rows_leak_into_the_next_a_little_is_padded(family, dtype):
    assert isinstance(set_up_packing_(_random_model(family, dtype, **_MIXED[family])), str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_family_that_rounds_is_packed_in_bfloat16_too(family, dtype):
    assert isinstance(set_up_packing_(_random_model(family, dtype)), Packing)


def test_llama4_reads_padded_rows_and_says_why():
    policy = tiny_policy("llama4_text")
    assert "attn_temperature_tuning" in set_up_packing_(policy.backbone)
    rows = make_rows(policy)
    values, tokens = policy.sequence_values(make_batch(policy, rows), torch.tensor([row.user_id for row in rows]))
    alone = _one_by_one(policy, rows, [row.user_id for row in rows])
    assert ((values - alone).abs() / tokens).max() < PER_TOKEN


def test_attention_that_depends_on_a_place_beyond_the_first_trees_is_noticed(monkeypatch):
    monkeypatch.setattr(packing, "PLACE_KEYS", ())
    policy = tiny_policy("llama4_text")
    assert "off by" in set_up_packing_(policy.backbone)
    monkeypatch.setattr(packing, "PROBES", packing.PROBES[:1])
    assert isinstance(set_up_packing_(policy.backbone), Packing)


def test_a_family_whose_decoder_is_named_otherwise_is_packed_and_scored_as_a_reward_model_too():
    """Of Llama 4 `base_model` is the whole model."""
    policy = tiny_policy("llama4_text")
    assert policy.backbone.base_model is policy.backbone
    policy.backbone.config.attn_temperature_tuning = False
    for layer in policy.backbone.model.layers:
        layer.self_attn.attn_temperature_tuning = False
    policy.packing = set_up_packing_(policy.backbone)
    assert policy.packing == Packing(policy.backbone.config.attention_chunk_size)
    policy.head = find_head(policy.backbone)
    assert policy.head == Head()
    model = PersonalizedRewardModel(
        policy.backbone, policy.tokenizer, user_encoder=policy.user_encoder, users=policy.users
    )
    model.packing = policy.packing
    randomize_(model.score, scale=1.0)
    for either in (policy, model):
        for (values, tokens), (expected, _) in zip(*_both(either, make_batch(policy)), strict=True):
            assert ((values - expected).abs() / tokens).max() < PER_TOKEN


def test_a_family_that_raises_anywhere_while_it_is_tried_is_padded(monkeypatch):
    policy = tiny_policy()
    monkeypatch.setattr(packing, "decoder", lambda _: {}["last_hidden_state"])
    before = policy.backbone.config._attn_implementation
    assert set_up_packing_(policy.backbone) == "KeyError: 'last_hidden_state'"
    assert policy.backbone.config._attn_implementation == before


def test_rows_longer_than_a_sliding_window_are_padded_and_right(monkeypatch):
    policy = _packed_policy("gemma3_text")
    assert policy.packing.window == 16
    batch = make_batch(policy)
    monkeypatch.setattr(policy, "packed_values", lambda *_: pytest.fail("packed in spite of the window"))
    expected, _ = policy.padded_values(batch, batch.user_ids)
    assert torch.equal(policy.sequence_logps(batch, batch.user_ids)[0], expected)


@pytest.mark.parametrize("variant", ["plain", "no_bos"])
@pytest.mark.parametrize("users", [True, False])
def test_running_text_without_a_prompt_is_scored_as_in_padded_rows(variant, users):
    policy = _packed_policy(variant=variant)
    bos = () if variant == "no_bos" else (0,)
    batch = collate_responses([TokenizedResponse(i, i, bos, tuple(range(5, 9 + i))) for i in range(3)], pad_id=2)
    user_ids = batch.user_ids if users else None
    values, tokens = policy.sequence_logps(batch, user_ids)
    expected, expected_tokens = policy.padded_values(batch, user_ids)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)


def test_trees_with_any_number_of_responses_are_scored_as_padded_rows():
    policy = _packed_policy()
    trees = [
        ResponseTree(0, 2, (0, 5, 6), ((7, 8, 1), (9, 1), (7, 8, 1))),
        ResponseTree(1, 0, (0, 5, 6), ((10, 1),)),
    ]
    batch = collate_trees(trees, pad_id=2)
    values, tokens = policy.sequence_logps(batch, batch.user_ids)
    expected, _ = policy.padded_values(batch, batch.user_ids)
    assert tokens.tolist() == [3, 2, 3, 2] and values[0] == values[2]
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def packed_policy() -> PersonalizedPolicy:
    return _packed_policy()


# Few tokens and short texts, so that prompts and responses recur within and across rows.
TEXTS = st.lists(st.integers(FIRST_ORDINARY_TOKEN, FIRST_ORDINARY_TOKEN + 2), min_size=1, max_size=5).map(tuple)
ROWS = st.lists(st.tuples(st.integers(0, 2), TEXTS, TEXTS, TEXTS), min_size=1, max_size=5)


@settings(max_examples=30)
@given(rows=ROWS)
def test_any_rows_are_packed_without_a_second_copy_and_scored_as_padded_ones(packed_policy, rows):
    pairs = [TokenizedPair(i, user, (0, *x), chosen, rejected) for i, (user, x, chosen, rejected) in enumerate(rows)]
    batch = make_batch(packed_policy, pairs)
    with torch.no_grad():
        packed, padded = _both(packed_policy, batch)
    for (values, tokens), (expected, expected_tokens) in zip(packed, padded, strict=True):
        assert torch.equal(tokens, expected_tokens)
        assert ((values - expected).abs() / tokens).max() < PER_TOKEN
    shared = make_pack(batch, [Term(None, None, shared=True)], num_soft=NUM_USER_TOKENS, num_bos=1)
    prefixes = {pair.prompt_ids for pair in pairs}
    responses = {(pair.prompt_ids, response) for pair in pairs for response in pair.responses}
    assert sorted(shared.trees.prefixes) == sorted(map(len, prefixes))
    assert len(shared.order) == sum(map(len, prefixes)) + sum(len(response) for _, response in responses)


@pytest.mark.parametrize("scored", [0, 1], ids=["first row", "last row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_flows_from_one_row_into_the_soft_prompt_of_another(family, scored):
    policy = _policy_of(family)
    rows = [make_row(policy, 0, user_id=1, lengths=(4, 6, 3)), make_row(policy, 1, user_id=2, lengths=(5, 2, 7))]
    batch = make_batch(policy, rows)
    policy.logps(batch, batch.user_ids).chosen[scored].backward()
    gradient = policy.user_encoder.offsets.grad
    assert (gradient[scored] != 0).all(dim=-1).all()
    assert torch.equal(gradient[1 - scored], torch.zeros_like(gradient[1 - scored]))


def test_the_generic_tree_of_a_pair_that_several_users_judged_is_computed_once():
    policy = _packed_policy()
    pair = make_row(policy, 0, user_id=1, lengths=(4, 6, 3))
    opposed = TokenizedPair(1, 2, pair.prompt_ids, pair.rejected_ids, pair.chosen_ids)
    other = make_row(policy, 2, user_id=1, lengths=(5, 2, 7))
    batch = make_batch(policy, [pair, opposed, other])
    generic = torch.zeros_like(batch.user_ids)
    terms = [Term(batch.user_ids, None, shared=False), Term(generic, None, shared=True)]
    pack = make_pack(batch, terms, num_soft=NUM_USER_TOKENS, num_bos=1)
    # BOS and soft prompt come on top of the prompts of 4, 4, 5 and of 4, 5 tokens.
    assert pack.trees.prefixes == (8, 8, 9, 8, 9)
    assert pack.trees.responses == ((6, 3), (3, 6), (2, 7), (6, 3), (2, 7))
    packed, padded = _both(policy, batch)
    torch.testing.assert_close(packed[1][0], padded[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(_gradient(policy, packed), _gradient(policy, padded), rtol=1e-4, atol=1e-5)


def test_a_pack_holds_each_token_once_and_no_pad():
    policy = _packed_policy()
    rows = make_rows(policy)
    pack = make_pack(make_batch(policy, rows), [Term(None, None, shared=True)], num_soft=NUM_USER_TOKENS, num_bos=1)
    expected = [token for row in rows for token in row.prompt_ids + row.chosen_ids + row.rejected_ids]
    assert pack.token_ids.tolist() == expected and len(pack.order) == len(expected)


@pytest.mark.parametrize("lora", [True, False])
def test_gradient_checkpointing_recomputes_over_the_same_trees(lora):
    policy = _packed_policy(lora=lora)
    randomize_(policy.user_encoder, scale=0.1)
    batch = make_batch(policy)
    expected = _gradient(policy, _both_terms(policy, batch))
    policy.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    gradient = _gradient(policy, _both_terms(policy, batch))
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


def test_under_bfloat16_autocast_packed_rows_stay_close_to_float32():
    policy = _packed_policy()
    batch = make_batch(policy)
    expected, tokens = policy.sequence_logps(batch, batch.user_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _ = policy.sequence_logps(batch, batch.user_ids)
    assert values.dtype == torch.float32
    assert 0 < ((values - expected).abs() / tokens).max() < 2e-2


def test_the_reference_reads_packs_with_adapters_off():
    policy = _packed_policy(lora=True)
    batch = make_batch(policy)
    bare, _ = policy.sequence_logps(batch, None)
    randomize_(policy, scale=0.1)
    assert torch.equal(policy.reference.sequence_logps(batch)[0], bare)
    assert not torch.allclose(policy.sequence_logps(batch, None)[0], bare, atol=1e-2)


def test_rewards_of_packed_rows_are_those_of_padded_rows():
    policy = _packed_policy()
    model = PersonalizedRewardModel(
        policy.backbone, policy.tokenizer, user_encoder=policy.user_encoder, users=policy.users
    )
    model.packing = policy.packing
    randomize_(model.score, scale=1.0)
    batch = make_batch(policy)
    for packed, padded in zip(*_both(model, batch), strict=True):
        torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(packed[1], padded[1])
