"""Baselines without training: what stands in front of the prompt, what counts as right, and rules on form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from prlhf.data.collate import collate_responses
from prlhf.data.records import Message, PreferenceRow
from prlhf.data.tokenize import TokenizedResponse, encode_prompt, tokenize_pairs
from prlhf.data.world.authored import load_instructions
from prlhf.data.world.psoups import TASTES
from prlhf.evaluation.baselines import (
    few_shot_baseline,
    format_only_accuracy,
    prompted_baseline,
    put_in_front,
    show_pairs,
)
from prlhf.models.policy import PersonalizedPolicy
from tests.policies import tiny_policy

OPTIONS: dict[str, Any] = {"max_tokens": 400, "seed": 1, "pad_id": 2, "microbatch_tokens": 10_000}


def _row(number: int, user_id: str = "ann", chosen: str = "yes", rejected: str = "no, never") -> PreferenceRow:
    return PreferenceRow(f"{number}", user_id, f"prompt {number}", f"{chosen} {number}", f"{rejected} {number}")


def _tokenized(policy: PersonalizedPolicy, rows: list[PreferenceRow]) -> list[Any]:
    limits = {"max_tokens": 200, "max_prompt_tokens": 100, "num_user_tokens": 0}
    return tokenize_pairs(rows, policy.tokenizer, None, **limits).rows


def _logp(policy: PersonalizedPolicy, prompt: str, response_ids: tuple[int, ...]) -> float:
    prompt_ids = tuple(encode_prompt(policy.tokenizer, prompt, max_prompt_tokens=1000))
    batch = collate_responses([TokenizedResponse(0, 0, prompt_ids, response_ids)], 2)
    with torch.no_grad():
        return policy.sequence_logps(batch, None)[0].item()


def test_prompted_is_the_gain_of_the_chosen_response_over_that_of_the_rejected_one() -> None:
    policy = tiny_policy(num_users=0)
    rows = [_row(i, user) for i in range(6) for user in ("ann", "bob", "cat")]
    wishes = {"ann": "Be short.", "bob": "Say more, please."}
    tokenized = _tokenized(policy, rows)
    block = prompted_baseline(policy, rows, tokenized, wishes, **OPTIONS)
    assert block is not None and block["num_rows"] == 12, "cat has no wish"
    right: dict[str, list[bool]] = {"ann": [], "bob": []}
    for ids in tokenized:
        row = rows[ids.row]
        if row.user_id in wishes:
            gains = [
                _logp(policy, f"{wishes[row.user_id]} {row.prompt}", response) - _logp(policy, row.prompt, response)
                for response in ids.responses
            ]
            right[row.user_id].append(gains[0] > gains[1])
    assert block["per_user"] == {user: pytest.approx(np.mean(values)) for user, values in right.items()}
    assert prompted_baseline(policy, rows, tokenized, {}, **OPTIONS) is None


def test_rows_without_room_for_the_wish_are_left_out() -> None:
    policy, rows = tiny_policy(num_users=0), [_row(0), replace(_row(1), prompt="p " * 60)]
    options = {**OPTIONS, "max_tokens": 100}
    block = prompted_baseline(policy, rows, _tokenized(policy, rows), {"ann": "Be short."}, **options)
    assert block is not None and block["num_rows"] == 1


def test_few_shot_shows_whole_pairs_of_the_user_and_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rows = tiny_policy(num_users=0), [_row(0), _row(1)]
    train = [_row(i) for i in range(2, 9)] + [_row(9, "bob", chosen="BOB")]
    shown: list[str] = []

    def note(row: PreferenceRow, text: str, **options: Any) -> PreferenceRow:
        shown.append(text)
        return put_in_front(row, text, **options)

    monkeypatch.setattr("prlhf.evaluation.baselines.put_in_front", note)
    tokenized = _tokenized(policy, rows)
    for max_tokens, fewer in ((10_000, False), (300, True)):
        block = few_shot_baseline(
            policy, rows, tokenized, train, num_pairs=4, **{**OPTIONS, "max_tokens": max_tokens}
        )
        assert block is not None and block["num_rows"] == 2
        assert (block["pairs"] < 4) is fewer and block["pairs"] >= 1
    assert not any("BOB" in text for text in shown)
    assert few_shot_baseline(policy, rows, tokenized, train, num_pairs=4, **{**OPTIONS, "max_tokens": 60}) is None
    assert few_shot_baseline(policy, rows, tokenized, train, num_pairs=0, **OPTIONS) is None
    assert few_shot_baseline(policy, rows, tokenized, train[-1:], num_pairs=4, **OPTIONS) is None


def test_no_pair_with_the_rows_own_prompt_is_shown() -> None:
    policy, rows = tiny_policy(num_users=0), [_row(0)]
    same_prompt = replace(_row(5), prompt="Prompt  0")
    assert few_shot_baseline(policy, rows, _tokenized(policy, rows), [same_prompt], num_pairs=2, **OPTIONS) is None


def test_text_stands_before_the_question_and_joins_the_system_message_of_a_conversation() -> None:
    assert put_in_front(_row(0), "Be short.", separator=" ").prompt == "Be short. prompt 0"
    dialogue = PreferenceRow("1", "ann", (Message("user", "hi"),), "a", "b", "I am Ann.")
    assert put_in_front(dialogue, "Be short.", separator=" ") == replace(dialogue, user_text="I am Ann.\nBe short.")
    text = show_pairs([_row(0), replace(dialogue, user_text="")])
    assert "Prompt: prompt 0\nAn answer that I like: yes 0\nAn answer that I do not like: no, never 0\n" in text
    assert "Prompt: hi\n" in text


def test_every_wish_is_one_that_asks_for_the_users_side() -> None:
    for taste in TASTES.values():
        assert taste.wish in load_instructions(taste.axis, side=taste.side)


def test_format_alone_learns_what_each_users_texts_look_like() -> None:
    """Ann likes lists and Bob does not; the words are the same."""
    prose, lists = "one two three", "- one\n- two\n- three"
    train = [
        PreferenceRow(str(i), user, "p", *((lists, prose) if user == "ann" else (prose, lists)))
        for i in range(25)
        for user in ("ann", "bob")
    ]
    evaluation = [replace(row, pair_id="x") for row in train[:2]]
    assert format_only_accuracy(train, evaluation) == 1.0
    few = [row for row in train if row.user_id == "ann"] + train[1:3:2]
    assert format_only_accuracy(few, [evaluation[1]]) == 0.0, "Bob has too few rows for a rule of his own"
    same = PreferenceRow("1", "ann", "p", "abc", "xyz")
    assert format_only_accuracy(train, [same]) == 0.5, "nothing tells the two apart"
    assert format_only_accuracy([], evaluation) is None and format_only_accuracy(train, []) is None


def test_a_difference_of_form_that_all_rows_share_tells_the_two_apart() -> None:
    """Two such features once made the rule's equations singular; one row of training is the extreme case."""
    train = [PreferenceRow(f"{i}", "ann", f"p{i}", f"Sure, it is {i}!", f"it is {i} .") for i in range(30)]
    for part in (train, train[:1]):
        assert format_only_accuracy(part, train) == 1.0
