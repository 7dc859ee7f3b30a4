"""Rows that join and leave a running batch are answered as if each were alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from prlhf.generation import SamplingOptions, generate_ids
from prlhf.generation.slots import SlotCache
from prlhf.models.packing import set_up_packing_
from tests.families import FAMILIES
from tests.policies import tiny_policy

# Lengths around the sliding window of the Gemma families (16), and far beyond it.
PROMPTS = [[0, *range(9, 9 + length)] for length in (1, 40, 3, 17, 30, 2, 14, 40, 5, 22)]
USERS = [1, 0, 2, 1, 2, 0, 1, 2, 2, 0]
# Answers end after different numbers of tokens.
RAGGED = SamplingOptions(max_new_tokens=24, temperature=1.0, seed=4, stop_strings=("a", "e", "Q"))


def _alone(policy: Any, options: SamplingOptions, users: list[int | None]) -> list[list[int]]:
    return [
        generate_ids(policy, [prompt], None if user is None else [user], options=options, streams=[i])[0]
        for i, (prompt, user) in enumerate(zip(PROMPTS, users, strict=True))
    ]


@pytest.mark.parametrize("head_share", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_waiting_rows_take_the_places_of_finished_ones_and_no_answer_changes(family, head_share, caplog, monkeypatch):
    monkeypatch.setattr("prlhf.generation.decode.HEAD_SHARE", head_share)
    policy = tiny_policy(family)
    set_up_packing_(policy.backbone)
    expected = _alone(policy, RAGGED, USERS)
    assert len({len(answer) for answer in expected}) > 3
    for batch_rows in (3, 9):
        assert generate_ids(policy, PROMPTS, USERS, options=RAGGED, batch_rows=batch_rows) == expected
    assert "one row at a time" not in caplog.text


def test_many_prompts_pass_through_few_slots():
    policy = tiny_policy()
    options = SamplingOptions(max_new_tokens=30, temperature=1.0, stop_strings=("a",))
    prompts, users = PROMPTS * 2, USERS * 2
    together = generate_ids(policy, prompts, users, options=options, batch_rows=4)
    each = zip(prompts, users, strict=True)
    assert together == [
        generate_ids(policy, [prompt], [user], options=options, streams=[i])[0]
        for i, (prompt, user) in enumerate(each)
    ]


def test_rows_are_moved_to_the_left_when_the_columns_are_used_up(monkeypatch):
    policy, moves = tiny_policy(), []
    expected = _alone(policy, RAGGED, USERS)
    monkeypatch.setattr("prlhf.generation.decode.SPARE_COLUMNS", 1)
    real = SlotCache.make_room_

    def counted(cache: SlotCache) -> None:
        before = cache._columns.end
        real(cache)
        moves.append(cache._columns.end < before)

    monkeypatch.setattr(SlotCache, "make_room_", counted)
    assert generate_ids(policy, PROMPTS, USERS, options=RAGGED, batch_rows=2) == expected
    assert any(moves)


def test_a_user_whose_embedding_is_not_finite_spoils_no_other_answer():
    policy = tiny_policy()
    before = generate_ids(policy, PROMPTS, USERS, options=RAGGED, batch_rows=3)
    with torch.no_grad():
        policy.user_encoder.offsets[1] = torch.nan  # of user 2
    after = generate_ids(policy, PROMPTS, USERS, options=RAGGED, batch_rows=3)
    assert [after[i] for i, user in enumerate(USERS) if user != 2] == [
        before[i] for i, user in enumerate(USERS) if user != 2
    ]


@pytest.mark.parametrize("prefill_tokens", [8, 512])  # one prompt a call, or all in one
@pytest.mark.parametrize("users", [USERS, None])
def test_what_lay_in_the_cache_s_memory_before_changes_no_answer(users, prefill_tokens, monkeypatch):
    monkeypatch.setattr("prlhf.generation.decode.PREFILL_TOKENS", prefill_tokens)
    policy = tiny_policy()
    set_up_packing_(policy.backbone)
    prompts = [prompt[:1] if i in (2, 4, 5) else prompt for i, prompt in enumerate(PROMPTS)]
    before = generate_ids(policy, prompts, users, options=RAGGED, batch_rows=9)
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert generate_ids(policy, prompts, users, options=RAGGED, batch_rows=9) == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_equal_prompts_are_read_once_and_no_prompt_has_logits():
    policy = tiny_policy()
    generate_ids(policy, [[0, 7]], None, options=RAGGED)  # the backbone is tried once
    read, logits = [], []
    policy.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    policy.backbone.lm_head.register_forward_hook(lambda module, args, out: logits.append(out.shape[1]))
    prompts = [PROMPTS[1], PROMPTS[3]] * 3
    answers = generate_ids(policy, prompts, None, options=RAGGED)
    assert read[0] == (2, 40) and read[1] == (6, 1)  # two prompts but for their last tokens, then six rows
    assert set(logits) == {1}
    assert len({tuple(answer) for answer in answers}) > 2


def test_the_soft_prompt_of_a_user_with_several_prompts_is_read_once(monkeypatch):
    monkeypatch.setattr("prlhf.generation.decode.HEAD_SHARE", 0.0)
    policy = tiny_policy()
    users = [1, 0, 2, 1, 2, 0, 1, 2, 2, 0]
    expected = _alone(policy, RAGGED, users)
    read, made = [], []
    policy.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    policy.user_encoder.register_forward_pre_hook(lambda module, args: made.append(len(args[0])))
    assert generate_ids(policy, PROMPTS, users, options=RAGGED) == expected
    num_soft = policy.soft_prompt.num_user_tokens
    assert read[0] == (3, 1 + num_soft) and read[1] == (10, 39) and made == [3]  # of 41 ids
    assert generate_ids(policy, [[0, 8], [0, 9]], [1, 1], options=RAGGED) == [
        generate_ids(policy, [[0, token]], [1], options=RAGGED, streams=[i])[0] for i, token in enumerate((8, 9))
    ]


def test_heads_are_read_a_few_at_a_time_and_told_apart_by_what_they_begin_with(monkeypatch):
    monkeypatch.setattr("prlhf.generation.decode.HEAD_SHARE", 0.0)
    policy = tiny_policy()
    prompts = [[first, *range(9, 9 + length)] for length in (3, 5, 9) for first in (0, 7)] * 2
    users = [1] * 6 + [2] * 6
    expected = [
        generate_ids(policy, [prompt], [user], options=RAGGED, streams=[i])[0]
        for i, (prompt, user) in enumerate(zip(prompts, users, strict=True))
    ]
    read = []
    policy.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    width = 1 + policy.soft_prompt.num_user_tokens
    monkeypatch.setattr("prlhf.generation.decode.PREFILL_TOKENS", 3 * width)
    assert generate_ids(policy, prompts, users, options=RAGGED) == expected
    assert read[:2] == [(3, width), (1, width)]  # two users with two beginnings each


def test_soft_prompts_are_read_with_their_prompts_where_little_is_spared_or_users_are_many(monkeypatch):
    policy = tiny_policy()
    read = []
    policy.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    width = 3 + policy.soft_prompt.num_user_tokens
    generate_ids(policy, [[0, 5, 6, 7], [0, 8, 9, 7]], [1, 2], options=RAGGED)
    assert (2, width) in read
    monkeypatch.setattr("prlhf.generation.decode.MAX_HEADS", 1)
    read.clear()
    generate_ids(policy, [[0, 5 + i, 6, 7] for i in range(4)], [1, 1, 2, 2], options=RAGGED)
    assert read[0] == (4, width)


@pytest.mark.parametrize("settings", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 2}])
def test_repetition_settings_do_what_they_do_in_transformers(settings):
    policy = tiny_policy()
    options = SamplingOptions(max_new_tokens=24, temperature=0, **settings)
    expected = []
    for prompt, user in zip(PROMPTS, USERS, strict=True):
        embeds = policy.input_embeds(torch.tensor([prompt]), torch.tensor([user]))
        out = policy.backbone.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=24, **settings)[0].tolist()
        expected.append(out[: out.index(1)] if 1 in out else out)
    assert generate_ids(policy, PROMPTS, USERS, options=options, batch_rows=4) == expected
    assert expected != generate_ids(policy, PROMPTS, USERS, options=SamplingOptions(max_new_tokens=24, temperature=0))


def test_a_backbone_that_cannot_read_slots_says_so_and_answers_alike_one_row_at_a_time(caplog):
    policy = tiny_policy()
    expected = generate_ids(policy, PROMPTS, USERS, options=RAGGED)
    refusing = tiny_policy()

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if isinstance(kwargs.get("past_key_values"), SlotCache):
            raise TypeError("this family has a cache of its own")

    refusing.backbone.register_forward_pre_hook(refuse, with_kwargs=True)
    with caplog.at_level(logging.WARNING):
        assert generate_ids(refusing, PROMPTS, USERS, options=RAGGED) == expected
    assert "LlamaForCausalLM" in caplog.text and "this family has a cache of its own" in caplog.text
