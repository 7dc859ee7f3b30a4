"""Batched answers: each row's own, whoever stands beside it, and the same again under the same seed."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from prlhf.data.records import Message
from prlhf.errors import ConfigError, DataError
from prlhf.generation import SamplingOptions, generate, generate_ids
from prlhf.models import PolicySpec, make_policy
from prlhf.models.policy import PersonalizedPolicy
from tests.families import FAMILIES, MAX_POSITIONS
from tests.policies import NUM_USER_TOKENS, give_longrope_, save_folder, tiny_policy
from tests.tokenizers import VARIANTS

GREEDY = SamplingOptions(max_new_tokens=12, temperature=0)
SAMPLED = SamplingOptions(max_new_tokens=12, temperature=1.0, seed=5)
# BOS first; the second is longer than the sliding window of the Gemma families (16), the others much shorter.
PROMPTS = [[0, 9, 40], [0, *range(20, 51)], [0, 7], [0, 33, 34, 35, 99]]
USERS = [1, 0, 2, 1]
TEXTS = ["Tell me about tea.", "Bees?", "Where is the sea, and why does it answer twice a day?"]


@torch.no_grad()
def _greedy_without_cache(policy: PersonalizedPolicy, prompt: list[int], user: int | None, count: int) -> list[int]:
    """Arg max after arg max, each from a forward pass over everything before it."""
    ids = list(prompt)
    users = None if user is None else torch.tensor([user])
    for _ in range(count):
        logits = policy.backbone(inputs_embeds=policy.input_embeds(torch.tensor([ids]), users), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    answer = ids[len(prompt) :]
    eos = policy.tokenizer.eos_token_id
    return answer[: answer.index(eos)] if eos in answer else answer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_users_is_answered_as_each_one_alone_without_a_cache(family):
    policy = tiny_policy(family)
    answers = generate_ids(policy, PROMPTS, USERS, options=GREEDY)
    expected = [_greedy_without_cache(policy, *row, 12) for row in zip(PROMPTS, USERS, strict=True)]
    assert answers == expected
    assert answers == [
        generate_ids(policy, [prompt], [user], options=GREEDY)[0] for prompt, user in zip(PROMPTS, USERS, strict=True)
    ]


def test_a_family_whose_generation_takes_no_embeddings_is_answered_without_its_cache():
    policy = tiny_policy("falcon_h1")
    assert "inputs_embeds" not in inspect.signature(policy.backbone.prepare_inputs_for_generation).parameters
    expected = [_greedy_without_cache(policy, *row, 12) for row in zip(PROMPTS, USERS, strict=True)]
    assert generate_ids(policy, PROMPTS, USERS, options=GREEDY) == expected
    sampled = generate_ids(policy, PROMPTS, USERS, options=SAMPLED)
    assert sampled == generate_ids(policy, PROMPTS, USERS, options=SAMPLED) != expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
def test_without_users_the_batch_is_answered_by_the_bare_model(family):
    policy = tiny_policy(family, num_users=0)
    expected = [_greedy_without_cache(policy, prompt, None, 12) for prompt in PROMPTS]
    assert generate_ids(policy, PROMPTS, None, options=GREEDY) == expected


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_users_answer_does_not_change_with_the_embedding_of_another(options):
    policy = tiny_policy()
    before = generate_ids(policy, PROMPTS, USERS, options=options)
    with torch.no_grad():
        policy.user_encoder.offsets[1] += 5  # of user 2
    after = generate_ids(policy, PROMPTS, USERS, options=options)
    assert [after[i] for i in (0, 1, 3)] == [before[i] for i in (0, 1, 3)]
    assert after[2] != before[2]


def test_one_prompt_is_answered_differently_for_different_users():
    policy = tiny_policy()
    answers = generate_ids(policy, [PROMPTS[1]] * 3, [0, 1, 2], options=GREEDY)
    assert len({tuple(answer) for answer in answers}) == 3


class _FixedLogits(nn.Module):
    """In place of an output layer: the same logits after every token."""

    def __init__(self, vocab_size: int, probabilities: dict[int, float]) -> None:
        super().__init__()
        logits = torch.full((vocab_size,), -1e9)
        for token, probability in probabilities.items():
            logits[token] = math.log(probability)
        self.register_buffer("logits", logits)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


def _fixed_policy(probabilities: dict[int, float], **settings: Any) -> PersonalizedPolicy:
    policy = tiny_policy(**settings)
    policy.backbone.lm_head = _FixedLogits(len(policy.tokenizer), probabilities)
    return policy


@pytest.mark.parametrize("variant", ["plain", "pad_is_eos", "no_pad"])
def test_generation_stops_at_eos_whatever_the_pad(variant):
    policy = _fixed_policy({1: 0.3, 50: 0.7}, variant=variant)
    options = SamplingOptions(max_new_tokens=60, temperature=1.0)
    answers = generate_ids(policy, PROMPTS * 10, None, options=options)
    assert {token for answer in answers for token in answer} == {50}
    lengths = [len(answer) for answer in answers]
    # Geometric with mean 0.7 / 0.3 and standard deviation 2.8: the mean of 40 is within 1.8 (four times 0.44).
    assert sum(lengths) / len(lengths) == pytest.approx(0.7 / 0.3, abs=1.8)
    assert generate_ids(_fixed_policy({1: 1.0}, variant=variant), PROMPTS, None, options=options) == [[]] * 4


def test_generation_stops_at_the_end_of_turn_of_a_chat_model():
    policy = _fixed_policy({50: 0.5, 2: 0.5})
    options = SamplingOptions(max_new_tokens=40, temperature=1.0)
    assert any(2 in answer for answer in generate_ids(policy, PROMPTS, None, options=options))
    policy.backbone.generation_config.eos_token_id = [1, 2, 50]  # 50 is an ordinary token: a mistake of the folder's
    answers = generate_ids(policy, PROMPTS, None, options=options)
    assert {token for answer in answers for token in answer} == {50}


def test_sampling_defaults_in_a_models_folder_are_set_aside_and_put_back():
    policy = tiny_policy()
    expected = generate_ids(policy, PROMPTS, USERS, options=GREEDY)
    theirs = GenerationConfig(suppress_tokens=expected[0][:1], num_beams=3, min_new_tokens=12, repetition_penalty=9.0)
    policy.backbone.generation_config = theirs
    assert generate_ids(policy, PROMPTS, USERS, options=GREEDY) == expected
    assert policy.backbone.generation_config is theirs


def test_draws_follow_the_softmax_at_the_temperature():
    """At temperature 2 probabilities of .64, .32 and .04 are as 8 to 5.657 to 2, their roots."""
    policy = _fixed_policy({50: 0.64, 60: 0.32, 70: 0.04})
    options = SamplingOptions(max_new_tokens=100, temperature=2.0)
    counts = Counter(token for row in generate_ids(policy, PROMPTS * 5, None, options=options) for token in row)
    assert set(counts) == {50, 60, 70} and counts.total() == 2000
    # 2,000 draws: standard deviations are at most 0.0112.
    for token, root in ((50, 8.0), (60, 5.657), (70, 2.0)):
        assert counts[token] / 2000 == pytest.approx(root / 15.657, abs=0.04)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.75}])
def test_top_k_and_top_p_leave_the_likeliest_tokens(settings):
    policy = _fixed_policy({50: 0.5, 60: 0.3, 70: 0.2})
    options = SamplingOptions(max_new_tokens=100, temperature=1.0, **settings)
    counts = Counter(token for row in generate_ids(policy, PROMPTS, None, options=options) for token in row)
    assert set(counts) == {50, 60}
    # 400 draws of 5/8: standard deviation 0.024.
    assert counts[50] / 400 == pytest.approx(0.625, abs=0.1)


def test_repetition_settings_reach_the_decoder():
    policy = _fixed_policy({50: 0.6, 60: 0.4})
    options = SamplingOptions(max_new_tokens=5, temperature=0, no_repeat_ngram_size=2)
    assert generate_ids(policy, [[0, 9]], None, options=SamplingOptions(max_new_tokens=5, temperature=0)) == [[50] * 5]
    answer = generate_ids(policy, [[0, 9]], None, options=options)[0]
    pairs = list(zip(answer, answer[1:], strict=False))
    assert answer[:2] == [50, 50] and len(set(pairs)) == len(pairs) == 4
    # log 0.6 = -0.51 falls to -1.53 when it is multiplied by 3, below log 0.4 = -0.92.
    penalized = SamplingOptions(max_new_tokens=2, temperature=0, repetition_penalty=3.0)
    assert generate_ids(policy, [[0, 9]], None, options=penalized) == [[50, 60]]


def test_the_same_seed_gives_the_same_texts_and_leaves_the_callers_random_state_alone():
    policy = tiny_policy()
    before = torch.random.get_rng_state()
    first = generate(policy, TEXTS, [0, 1, 2], options=SAMPLED)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        assert generate(policy, TEXTS, [0, 1, 2], options=SAMPLED) == first
    other = SamplingOptions(max_new_tokens=12, temperature=1.0, seed=6)
    assert generate(policy, TEXTS, [0, 1, 2], options=other) != first


def test_equal_rows_are_answered_by_draws_of_their_own():
    answers = generate_ids(tiny_policy(), [PROMPTS[0]] * 4, [1] * 4, options=SAMPLED)
    assert len({tuple(answer) for answer in answers}) == 4


def test_a_row_with_its_stream_is_answered_alone_as_among_others():
    policy = tiny_policy()
    whole = generate(policy, TEXTS, [0, 1, 2], options=SAMPLED, streams=[7, 1, 4])
    alone = [generate(policy, [TEXTS[i]], [i], options=SAMPLED, streams=[(7, 1, 4)[i]])[0] for i in range(3)]
    assert alone == whole
    assert generate(policy, [TEXTS[2]], [2], options=SAMPLED, streams=[5])[0] != whole[2]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_texts_do_not_depend_on_how_prompts_are_batched(options):
    policy = tiny_policy()
    calls = []
    whole = generate(policy, TEXTS, [0, 1, 2], options=options)
    single = generate(policy, TEXTS, [0, 1, 2], options=options, batch_rows=1, on_batch=lambda: calls.append(1))
    assert single == whole and len(calls) == 3 and len(set(whole)) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_tokenizer_gives_texts_in_the_order_of_the_prompts(variant):
    policy = tiny_policy(variant=variant)
    together = generate(policy, TEXTS, [2, 0, 1], options=GREEDY)
    alone = [generate(policy, [text], [user], options=GREEDY)[0] for text, user in zip(TEXTS, [2, 0, 1], strict=True)]
    assert together == alone and all(together)


def test_messages_and_user_texts_are_rendered_for_a_chat_model():
    policy = tiny_policy(variant="chat")
    messages = (Message("user", "Bees?"),)
    assert generate(policy, [messages], [1], options=GREEDY) == generate(policy, ["Bees?"], [1], options=GREEDY)
    with_text = generate(policy, ["Bees?"], [1], user_texts=["I like the sea."], options=GREEDY)
    assert with_text != generate(policy, ["Bees?"], [1], options=GREEDY)
    with pytest.raises(DataError, match="no chat template"):
        generate(tiny_policy(), [messages], [1], options=GREEDY)


@pytest.mark.parametrize("num_users", [0, 2])
def test_a_prompt_is_refused_when_it_and_the_answer_exceed_the_models_positions(num_users):
    policy = tiny_policy("gpt2", num_users=num_users)
    num_soft = NUM_USER_TOKENS if num_users else 0
    users = [1, 1] if num_users else None
    fitting = [0, *[9] * (MAX_POSITIONS - 12 - num_soft - 1)]
    generate_ids(policy, [[0, 5], fitting], users, options=GREEDY)
    with pytest.raises(DataError, match=f"245 positions and 12 new tokens, but the backbone has {MAX_POSITIONS}"):
        generate_ids(policy, [[0, 5], [*fitting, 9]], users, options=GREEDY)


def test_an_answer_that_would_change_the_frequencies_of_those_beside_it_is_refused(tmp_path):
    save_folder(tmp_path, family="phi3")
    folder = give_longrope_(tmp_path, 32)
    policy = make_policy(PolicySpec(backbone=folder, dtype="float32", seed=0, user_kind="none"), [])
    generate_ids(policy, [[0, 5], [0, *[9] * 19]], None, options=GREEDY)
    with pytest.raises(DataError, match="21 positions and 12 new tokens, .* 32 positions up to its original_max_posit"):
        generate_ids(policy, [[0, 5], [0, *[9] * 20]], None, options=GREEDY)


def test_a_prompt_that_is_too_long_is_refused_before_any_work_is_done():
    policy = tiny_policy()
    policy.backbone.forward = pytest.fail
    with pytest.raises(DataError, match="shorten the prompt"):
        generate(policy, ["Tea?", "x7" * 200], [1, 1], options=GREEDY, batch_rows=1)


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it():
    policy = tiny_policy()
    options = SamplingOptions(max_new_tokens=40, temperature=1.0, seed=3)
    whole = generate(policy, TEXTS, [0, 1, 2], options=options)
    stop = whole[0][5:7]
    stopping = dataclasses.replace(options, stop_strings=("never said", stop))
    stopped = generate(policy, TEXTS, [0, 1, 2], options=stopping)
    assert stopped == [text.split(stop)[0].strip() for text in whole] and stopped[0] != whole[0]
    ids = generate_ids(policy, [[0, 9]], [1], options=options)[0]
    stop = policy.tokenizer.decode(ids[3:5])
    assert generate_ids(policy, [[0, 9]], [1], options=dataclasses.replace(options, stop_strings=(stop,))) == [ids[:5]]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"temperature": -1.0, "top_p": 0.0}, ["temperature: got -1.0", "top_p: got 0.0"]),
        ({"temperature": float("nan")}, ["temperature: got nan"]),
        ({"temperature": 0.0, "top_k": 5}, ["temperature: 0 takes the likeliest token", "top_k 5"]),
        ({"stop_strings": "END"}, ["stop_strings: got 'END'"]),
        ({"stop_strings": ("",)}, ["stop_strings"]),
        ({"max_new_tokens": 0, "top_k": -1, "repetition_penalty": 0.0}, ["max_new_tokens", "top_k", "repetition_pen"]),
        ({"no_repeat_ngram_size": -1}, ["no_repeat_ngram_size"]),
    ],
)
def test_options_that_cannot_be_meant_are_refused_together(settings, parts):
    with pytest.raises(ConfigError) as refusal:
        SamplingOptions(**settings)
    assert all(part in str(refusal.value) for part in parts)


def test_an_empty_prompt_is_refused_without_bos():
    with pytest.raises(DataError, match="empty"):
        generate(tiny_policy(variant="no_bos"), ["Tea?", ""], [1, 1], options=GREEDY)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        generate(tiny_policy(), TEXTS, [1, 1], options=GREEDY)


def test_no_prompts_give_no_answers():
    assert generate(tiny_policy(), [], [], options=GREEDY) == []


def test_the_policy_returns_to_training_and_answers_without_dropout_in_between():
    policy = tiny_policy()
    expected = generate_ids(policy, PROMPTS, USERS, options=GREEDY)
    policy.train()
    modes = []
    policy.backbone.model.layers[0].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    policy.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert generate_ids(policy, PROMPTS, USERS, options=GREEDY) == expected
    assert modes and not any(modes)
    assert policy.training and policy.backbone.training
