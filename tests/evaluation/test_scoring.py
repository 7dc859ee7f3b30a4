"""Scores of ragged sequences, in the order given, however they are cut into batches."""

from __future__ import annotations

import pytest
import torch

from prlhf.evaluation.scoring import TokenSequence, score_sequences
from prlhf.models.packing import set_up_packing_
from tests.families import FAMILIES
from tests.policies import make_rows, plain_logps, tiny_policy


def _sequences(policy) -> list[TokenSequence]:
    rows = make_rows(policy)
    return [TokenSequence(row.prompt_ids, response) for row in rows for response in (row.chosen_ids, row.rejected_ids)]


@pytest.mark.parametrize("microbatch_tokens", [1, 100, 10_000])
def test_scores_come_in_the_order_given_however_they_are_batched(microbatch_tokens):
    policy = tiny_policy()
    sequences = _sequences(policy)
    calls = []
    scores = score_sequences(
        policy, sequences, None, pad_id=2, microbatch_tokens=microbatch_tokens, on_batch=lambda: calls.append(1)
    )
    expected = torch.stack([plain_logps(policy.backbone, *sequence).sum() for sequence in sequences])
    lengths = torch.tensor([len(sequence.response_ids) for sequence in sequences])
    assert torch.equal(scores.tokens, lengths)
    # 1e-5 nats a token: float32 sums in another order.
    assert ((scores.values - expected).abs() / lengths).max() < 1e-5
    # The sequences have 52, 43, 33, 20, 17, 14, 13 and 8 tokens: within 100 go one, then two, then five.
    assert len(calls) == {1: 8, 100: 3, 10_000: 1}[microbatch_tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sequence_is_scored_for_its_own_user(family):
    policy = tiny_policy(family)
    sequences = _sequences(policy)
    users = [0, 1, 2, 1, 0, 2, 1, 0]
    options = {"pad_id": 2, "microbatch_tokens": 10_000}
    together = score_sequences(policy, sequences, users, **options)
    alone = [score_sequences(policy, [s], [u], **options).values for s, u in zip(sequences, users, strict=True)]
    assert ((together.values - torch.cat(alone)).abs() / together.tokens).max() < 1e-5
    others = score_sequences(policy, sequences, [(user + 1) % 3 for user in users], **options)
    assert ((together.values - others.values).abs() > 1e-3).all()


def test_a_sequence_beyond_a_sliding_window_is_padded_alone_and_not_with_all_that_could_stand_beside_it():
    policy = tiny_policy("mistral")
    policy.backbone.config.sliding_window = 40
    policy.packing = set_up_packing_(policy.backbone)
    assert policy.packing.window == 40
    row = make_rows(policy)[1]  # 31 tokens of prompt, BOS included, and responses of 21 and of 2
    short = [TokenSequence((0, first, 9), (5, 6, 7)) for first in range(3, 43)]
    sequences = [*short[:20], TokenSequence(row.prompt_ids, row.chosen_ids), *short[20:]]
    options = {"pad_id": 2, "microbatch_tokens": 200}
    alone = [score_sequences(policy, [sequence], [1], **options).values for sequence in sequences]
    shapes = []
    policy.backbone.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    together = score_sequences(policy, sequences, [1] * len(sequences), **options)
    assert ((together.values - torch.cat(alone)).abs() / together.tokens).max() < 1e-5
    # 22 sequences of 9 positions in a pack of 198, 18 in the next, and 52 + 3 positions.
    assert shapes == [(1, 198), (1, 162), (1, 55)]


def test_scoring_keeps_no_graph_and_puts_the_mode_back():
    policy = tiny_policy().train()
    scores = score_sequences(policy, _sequences(policy), [1] * 8, pad_id=2, microbatch_tokens=100)
    assert not scores.values.requires_grad and policy.training and policy.backbone.training


def test_nothing_to_score_gives_no_scores():
    scores = score_sequences(tiny_policy(), [], [], pad_id=2, microbatch_tokens=100)
    assert scores.values.shape == scores.tokens.shape == (0,)


def test_a_stop_between_batches_leaves_the_policy_in_its_mode():
    def stop() -> None:
        raise KeyboardInterrupt

    policy = tiny_policy().train()
    with pytest.raises(KeyboardInterrupt):
        score_sequences(policy, _sequences(policy), None, pad_id=2, microbatch_tokens=100, on_batch=stop)
    assert policy.training


def test_as_many_users_as_sequences_are_expected():
    policy = tiny_policy()
    with pytest.raises(ValueError, match="zip"):
        score_sequences(policy, _sequences(policy), [1], pad_id=2, microbatch_tokens=100)
