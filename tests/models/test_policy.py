"""The policy's log-probs: in every family those of the plain model, whatever stands beside a row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prlhf.data.collate import collate_responses
from prlhf.data.tokenize import TokenizedResponse
from prlhf.models.backbone import input_embedding
from prlhf.models.head import find_head
from prlhf.models.policy import PersonalizedPolicy, Reference, ResponseLogps
from tests.families import FAMILIES
from tests.policies import (
    NUM_USER_TOKENS,
    make_batch,
    make_row,
    make_rows,
    plain_logps,
    randomize_,
    tiny_backbone,
    tiny_policy,
)
from tests.tokenizers import tiny_tokenizer

PER_TOKEN = 1e-5  # nats; float32 sums in another order


def assert_close_per_token(actual: ResponseLogps, expected: ResponseLogps) -> None:
    for name in ("chosen", "rejected"):
        tokens = getattr(expected, f"{name}_tokens")
        assert torch.equal(getattr(actual, f"{name}_tokens"), tokens)
        error = (getattr(actual, name) - getattr(expected, name)).abs() / tokens
        assert error.max() < PER_TOKEN, name


def _train_(policy: PersonalizedPolicy, *, num_steps: int) -> None:
    """Steps that move every trained tensor, away from the chosen responses."""
    policy.train()
    batch = make_batch(policy)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    for _ in range(num_steps):
        policy.logps(batch, batch.user_ids).chosen.sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_soft_prompt_made_of_token_embeddings_acts_as_those_tokens(family):
    policy = tiny_policy(family)
    tokens, text = [9, 40, 5], [17, 8, 30, 11, 12, 6]
    policy.user_encoder.init_(input_embedding(policy.backbone)(torch.tensor(tokens)))
    with torch.no_grad():
        embeds = policy.input_embeds(torch.tensor([[0, *text]]), torch.tensor([0]))
        logits = policy.backbone(inputs_embeds=embeds, use_cache=False).logits
        expected = policy.backbone(input_ids=torch.tensor([[0, *tokens, *text]]), use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    moved = torch.tensor([[0, *text]])
    assert not torch.allclose(logits[:, 4:], policy.backbone(input_ids=moved).logits[:, 1:], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_soft_prompt_log_probs_are_those_of_the_bare_model(family):
    policy = tiny_policy(family)
    rows = make_rows(policy)
    bare = tiny_backbone(family, policy.tokenizer)
    with torch.no_grad():
        logps = policy.logps(make_batch(policy, rows), None)
    chosen = [plain_logps(bare, row.prompt_ids, row.chosen_ids) for row in rows]
    rejected = [plain_logps(bare, row.prompt_ids, row.rejected_ids) for row in rows]
    expected = ResponseLogps(
        *(torch.stack([tokens.sum() for tokens in side]) for side in (chosen, rejected)),
        *(torch.tensor([len(tokens) for tokens in side]) for side in (chosen, rejected)),
    )
    assert_close_per_token(logps, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_alone_scores_as_it_does_in_a_padded_batch(family):
    policy = tiny_policy(family)
    rows = make_rows(policy)
    batch = make_batch(policy, rows)
    with torch.no_grad():
        together = policy.logps(batch, batch.user_ids)
        alone = [policy.logps(make_batch(policy, [row]), torch.tensor([row.user_id])) for row in rows]
    assert_close_per_token(together, ResponseLogps(*(torch.cat(values) for values in zip(*alone, strict=True))))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_flows_from_one_row_into_the_soft_prompt_of_another(family):
    policy = tiny_policy(family)
    rows = [make_row(policy, 0, user_id=1, lengths=(4, 6, 3)), make_row(policy, 1, user_id=2, lengths=(9, 2, 30))]
    batch = make_batch(policy, rows)
    policy.logps(batch, batch.user_ids).chosen[0].backward()
    gradient = policy.user_encoder.offsets.grad
    assert (gradient[0] != 0).all(dim=-1).all()
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_starting_backbone_bitwise_with_soft_prompts_and_adapters_off(family):
    policy = tiny_policy(family, lora=True)
    randomize_(policy, scale=0.1)
    batch = make_batch(policy)
    start = PersonalizedPolicy(tiny_backbone(family, policy.tokenizer), policy.tokenizer)
    start.head = find_head(start.backbone)
    with torch.no_grad():
        expected, _ = start.sequence_logps(batch, None)
        trained, _ = policy.sequence_logps(batch, None)
    logps, _ = policy.reference.sequence_logps(batch)
    assert torch.equal(logps, expected) and not logps.requires_grad
    assert not torch.allclose(trained, expected, atol=1e-2)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_training_leaves_the_reference_unchanged_bitwise(lora):
    policy = tiny_policy(lora=lora)
    if not lora:
        policy.reference = Reference(policy, frozen_copy=True)
    batch = make_batch(policy)
    before, _ = policy.reference.sequence_logps(batch)
    with torch.no_grad():
        policy_before, _ = policy.sequence_logps(batch, None)
    assert torch.equal(before, policy_before)
    _train_(policy, num_steps=3)
    after, _ = policy.reference.sequence_logps(batch)
    assert torch.equal(after, before)
    assert not torch.allclose(policy.sequence_logps(batch, None)[0], before, atol=1e-1)


def test_a_frozen_copy_is_trained_by_nobody_and_stays_in_evaluation_mode():
    policy = tiny_policy()
    policy.reference = Reference(policy, frozen_copy=True)
    names = set(policy.trainable())
    policy.train()
    with policy.reference.active() as frozen:
        assert frozen.trainable() == {} and not frozen.backbone.training
        with frozen.evaluating():
            pass
        assert not frozen.backbone.training
    assert set(policy.trainable()) == names


@pytest.mark.parametrize("variant", ["plain", "no_bos"])
def test_the_soft_prompt_stands_right_after_bos_or_first_without_one(variant):
    policy = tiny_policy(variant=variant)
    num_bos = 0 if variant == "no_bos" else 1
    ids = torch.tensor([[0, 7, 8, 9], [0, 4, 2, 2]])
    embeds = policy.input_embeds(ids, torch.tensor([2, 0]))
    tokens = input_embedding(policy.backbone)(ids)
    prompts = policy.user_encoder(torch.tensor([2, 0]))
    assert torch.equal(embeds[:, :num_bos], tokens[:, :num_bos])
    assert torch.equal(embeds[:, num_bos : num_bos + NUM_USER_TOKENS], prompts)
    assert torch.equal(embeds[:, num_bos + NUM_USER_TOKENS :], tokens[:, num_bos:])
    assert torch.equal(policy.input_embeds(ids, None), tokens)


def test_both_halves_of_a_pair_batch_carry_the_soft_prompts_of_its_rows():
    policy = tiny_policy()
    batch = make_batch(policy)
    with torch.no_grad():
        logps = policy.logps(batch, batch.user_ids)
        swapped = make_batch(
            policy,
            [
                type(row)(row.row, row.user_id, row.prompt_ids, row.rejected_ids, row.chosen_ids)
                for row in make_rows(policy)
            ],
        )
        other = policy.logps(swapped, swapped.user_ids)
        as_others = policy.logps(batch, torch.tensor([2, 1, 0, 2]))
    torch.testing.assert_close(other.rejected, logps.chosen, rtol=1e-6, atol=0)
    torch.testing.assert_close(other.chosen, logps.rejected, rtol=1e-6, atol=0)
    for side in ("chosen", "rejected"):
        assert ((getattr(as_others, side) - getattr(logps, side)).abs() > 1e-3).all()


@pytest.mark.parametrize("variant", ["plain", "no_bos"])
def test_the_first_token_after_a_soft_prompt_is_scored_by_its_last_position(variant):
    """Running text has an empty prompt: with a soft prompt in front, or BOS, its first token has a probability."""
    policy = tiny_policy(variant=variant)
    bos = () if variant == "no_bos" else (0,)
    batch = collate_responses([TokenizedResponse(0, 1, bos, (5, 6, 7))], pad_id=2)
    tokens = [9, 40, 5]
    policy.user_encoder.init_(input_embedding(policy.backbone)(torch.tensor(tokens)))
    with torch.no_grad():
        logps, counts = policy.sequence_logps(batch, torch.tensor([1]))
        bare_logps, bare_counts = policy.sequence_logps(batch, None)
    expected = plain_logps(policy.backbone, (*bos, *tokens), (5, 6, 7))
    assert counts.tolist() == [3]
    assert logps.item() == pytest.approx(expected.sum().item(), abs=3 * PER_TOKEN)
    # Without anything in front the first token cannot be scored.
    assert bare_counts.tolist() == [3 if bos else 2]
    bare = plain_logps(policy.backbone, bos or (5,), (5, 6, 7) if bos else (6, 7))
    assert bare_logps.item() == pytest.approx(bare.sum().item(), abs=3 * PER_TOKEN)


def test_logits_of_a_backbone_whose_head_is_not_known_exist_from_before_the_first_response_token_on():
    policy = tiny_policy()
    policy.head = None
    kept = []
    policy.backbone.register_forward_hook(
        lambda module, args, kwargs, output: kept.append(output.logits.shape[1]), with_kwargs=True
    )
    rows = [make_row(policy, 0, user_id=1, lengths=(19, 5, 3)), make_row(policy, 1, user_id=2, lengths=(11, 9, 30))]
    batch = make_batch(policy, rows)
    with torch.no_grad():
        policy.logps(batch, None)
        policy.logps(batch, batch.user_ids)
    # The longest sequence is BOS + 11 + 30 tokens, 12 of which no row scores.
    assert batch.input_ids.shape[1] == 42 and batch.num_unscored == 12
    assert kept == [31, 31]


class _Bigram(nn.Module):
    """The least of a backbone; transformers' own read numbers back from the device."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 4)
        self.head = nn.Linear(4, vocab_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, *, inputs_embeds: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(inputs_embeds[:, -logits_to_keep:]))


def test_scoring_never_waits_for_the_device():
    """The meta device has no numbers: whatever reads one back fails."""
    tokenizer = tiny_tokenizer()
    policy = PersonalizedPolicy(_Bigram(len(tokenizer)), tokenizer).to("meta")
    logps, tokens = policy.sequence_logps(make_batch(policy).to("meta"), None)
    assert logps.shape == tokens.shape == (8,)


def test_user_ids_are_refused_by_a_policy_without_users():
    policy = tiny_policy(num_users=0)
    with pytest.raises(ValueError, match="no user encoder; pass user_ids=None"):
        policy.logps(make_batch(policy), torch.tensor([0, 0, 0, 0]))


def test_evaluating_switches_dropout_and_gradients_off_and_puts_the_mode_back_after_an_error():
    policy = tiny_policy()
    policy.backbone.register_module("noise", nn.Dropout(0.5))
    policy.train()
    with pytest.raises(KeyError), policy.evaluating():
        assert not policy.backbone.noise.training and not torch.is_grad_enabled()
        raise KeyError
    assert policy.backbone.noise.training and torch.is_grad_enabled()


def test_trainable_names_the_adapters_and_the_users_alone():
    names = tiny_policy(lora=True).trainable()
    assert {name.rpartition(".")[2] for name in names} == {"lora_A", "lora_B", "generic", "offsets"}
    assert tiny_tokenizer().bos_token_id == 0  # make_row and the ids above rely on it
