"""Token boundaries, BOS and EOS, budgets and dropped rows, on toy and real tokenizers."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import NFC
from transformers import LlamaTokenizer

from prlhf.data.records import Message, PreferenceRow, ResponseRow
from prlhf.data.tokenize import encode_prompt, tokenize_pairs, tokenize_responses
from prlhf.data.user_index import UserIndex
from prlhf.errors import DataError

LIMITS = {"max_tokens": 400, "max_prompt_tokens": 200, "num_user_tokens": 10}
BOUNDARIES = Path(__file__).resolve().parents[1] / "corpus" / "tokenizer" / "boundaries.jsonl"
NASTY = [tuple(json.loads(line).values()) for line in BOUNDARIES.read_text(encoding="utf-8").split("\n")[:-1]]


def pair(prompt: Any, chosen: str, rejected: str, user_id: str = "u", user_text: str = "") -> PreferenceRow:
    return PreferenceRow("id", user_id, prompt, chosen, rejected, user_text)


def special_ids(tokenizer: Any) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def as_read(tokenizer: Any, text: str) -> str:
    """The text as the tokenizer itself gives it back.

    Sentencepiece puts a space in front of every text, unless it starts with one, and takes one away in decoding; its
    own mark for a space is one, too. GPT-NeoX composes accents (NFC).
    """
    if isinstance(tokenizer, LlamaTokenizer):
        return text.replace("\u2581", " ").removeprefix(" ")
    is_composed = isinstance(tokenizer.backend_tokenizer.normalizer, NFC)
    return unicodedata.normalize("NFC", text) if is_composed else text


@pytest.mark.parametrize(("prompt", "response"), NASTY)
def test_prompt_and_response_read_back_exactly(tokenizer: Any, prompt: str, response: str) -> None:
    result = tokenize_pairs([pair(prompt, response + "!", response + "?")], tokenizer, None, **LIMITS)
    (row,) = result.rows
    num_bos = 0 if tokenizer.bos_token_id is None else 1
    assert list(row.prompt_ids[:num_bos]) == [tokenizer.bos_token_id][:num_bos]
    assert tokenizer.decode(row.prompt_ids[num_bos:]) == as_read(tokenizer, prompt + "\n")
    for ids, text in ((row.chosen_ids, response + "!"), (row.rejected_ids, response + "?")):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == as_read(tokenizer, text)
    body = [*row.prompt_ids[num_bos:], *row.chosen_ids[:-1], *row.rejected_ids[:-1]]
    assert not special_ids(tokenizer) & set(body)


SPECIAL_NAMES = ["</s>", "<s>", "<unk>", "<|im_end|>", "<|endoftext|>", "<|begin|>"]
NASTY_PIECES = st.sampled_from([*SPECIAL_NAMES, " ", "\n", "a", ":", "\u0301", "\u2581", "\ufeff"])
ANY_TEXT = (st.text(max_size=20) | st.lists(NASTY_PIECES, max_size=6).map("".join)).filter(str.strip)


@settings(max_examples=50)
@given(prompts=st.tuples(ANY_TEXT, ANY_TEXT), responses=st.tuples(ANY_TEXT, ANY_TEXT))
def test_any_text_keeps_the_boundary(tokenizer: Any, prompts: tuple[str, str], responses: tuple[str, str]) -> None:
    (prompt, other), (first, second) = prompts, responses
    rows = [pair(prompt, first, second), pair(prompt, second, first), pair(other, first, second)]
    result = tokenize_pairs(rows, tokenizer, None, **LIMITS)
    assume(first != second and "equal_response_ids" not in result.dropped)  # as texts of which one is composed
    one, swapped, elsewhere = result.rows
    num_bos = 0 if tokenizer.bos_token_id is None else 1
    assert one.prompt_ids == swapped.prompt_ids, "whatever the response"
    assert one.responses == elsewhere.responses == swapped.responses[::-1], "whatever the prompt"
    assert list(one.prompt_ids[:num_bos]) == [tokenizer.bos_token_id][:num_bos]
    body = one.prompt_ids[num_bos:]
    assert tokenizer.decode(body) == as_read(tokenizer, f"{prompt}\n")
    for ids, text in zip(one.responses, responses, strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == as_read(tokenizer, text)
        assert not special_ids(tokenizer) & {*body, *ids[:-1]}


@given(
    texts=st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT),
    max_prompt_tokens=st.integers(1, 40),
    room=st.integers(1, 30),
    num_user_tokens=st.integers(0, 5),
)
def test_any_limits_are_kept_and_cut_old_prompt_text_and_ends_of_responses_alone(
    toy: Any, texts: tuple[str, str, str], max_prompt_tokens: int, room: int, num_user_tokens: int
) -> None:
    max_tokens, rows = max_prompt_tokens + room, [pair(*texts)]
    limits = {"max_prompt_tokens": max_prompt_tokens, "num_user_tokens": num_user_tokens}
    result = tokenize_pairs(rows, toy, None, max_tokens=max_tokens, **limits)
    if not result.rows:
        assert not {"empty_prompt", "empty_response"} & set(result.dropped)
        return
    (cut,) = result.rows
    (whole,) = tokenize_pairs(rows, toy, None, max_tokens=10_000, max_prompt_tokens=5_000, num_user_tokens=0).rows
    assert len(cut.prompt_ids) <= max_prompt_tokens and cut.num_tokens + num_user_tokens <= max_tokens
    num_left_out = len(whole.prompt_ids) - len(cut.prompt_ids)
    assert cut.prompt_ids == whole.prompt_ids[:1] + whole.prompt_ids[1 + num_left_out :]
    num_kept = max_tokens - num_user_tokens - len(cut.prompt_ids)
    assert [*cut.responses] == [ids[:num_kept] for ids in whole.responses]


def test_text_that_names_special_tokens_gets_no_special_id(tokenizer: Any) -> None:
    names = [tokenizer.convert_ids_to_tokens(index) for index in special_ids(tokenizer)]
    text = "".join(f"a {name}{name} b" for name in [*names, "</s>", "<|im_end|>", "<|endoftext|>"])
    limits = {"max_tokens": 2000, "max_prompt_tokens": 1000, "num_user_tokens": 10}
    (row,) = tokenize_pairs([pair(text, text, "r", user_text=text)], tokenizer, None, **limits).rows
    num_bos = 0 if tokenizer.bos_token_id is None else 1
    assert not special_ids(tokenizer) & set(row.prompt_ids[num_bos:] + row.chosen_ids[:-1])
    assert tokenizer.decode(row.prompt_ids[num_bos:]) == f"{text}\n{text}\n"


def test_user_text_stands_in_front_of_the_prompt_and_the_same_prompt_serves_generation(toy: Any) -> None:
    (row,) = tokenize_pairs([pair("What?", "a", "b", user_text="I am six.")], toy, None, **LIMITS).rows
    assert toy.decode(row.prompt_ids) == "<|begin|>I am six.\nWhat?\n"
    assert encode_prompt(toy, "What?", "I am six.", max_prompt_tokens=200) == list(row.prompt_ids)


def test_user_text_stays_out_of_the_prompt_when_only_a_user_model_reads_it(toy: Any) -> None:
    rows = [pair("What?", "a", "b", user_text="I am six.")]
    (row,) = tokenize_pairs(rows, toy, None, **LIMITS, with_user_text=False).rows
    assert toy.decode(row.prompt_ids) == "<|begin|>What?\n"
    responses = [ResponseRow("What?", "a", "I am six.")]
    for with_text, text in ((True, "I am six.\n"), (False, "")):
        (given,) = tokenize_responses(responses, toy, **LIMITS, with_user_text=with_text).rows
        assert toy.decode(given.prompt_ids) == f"<|begin|>{text}What?\n"


def test_rows_get_the_index_of_their_user_or_the_generic_one(toy: Any) -> None:
    rows = [pair("p", "a", "b", "v"), pair("p", "b", "a", "u")]
    seen = tokenize_pairs(rows, toy, UserIndex(["u", "v"]), **LIMITS).rows
    assert [(row.row, row.user_id) for row in seen] == [(0, 2), (1, 1)]
    assert [row.user_id for row in tokenize_pairs(rows, toy, None, **LIMITS).rows] == [0, 0]
    with pytest.raises(DataError, match="'v' is not one of the 1 known users"):
        tokenize_pairs(rows, toy, UserIndex(["u"]), **LIMITS)


def test_a_long_response_loses_its_end_and_gets_no_eos(toy: Any) -> None:
    limits = {"max_tokens": 20, "max_prompt_tokens": 10, "num_user_tokens": 4}
    (row,) = tokenize_pairs([pair("bcd", "x" * 11, "y" * 10)], toy, None, **limits).rows
    assert len(row.prompt_ids) == 5
    assert toy.decode(row.chosen_ids) == "x" * 11
    assert toy.decode(row.rejected_ids) == "y" * 10 + "<|im_end|>"
    (row,) = tokenize_pairs([pair("bcd", "x" * 12, "y")], toy, None, **limits).rows
    assert toy.decode(row.chosen_ids) == "x" * 11
    assert row.num_tokens + limits["num_user_tokens"] == limits["max_tokens"]


def test_a_long_string_prompt_keeps_bos_and_its_end(toy: Any) -> None:
    assert toy.decode(encode_prompt(toy, "bcdfgk", max_prompt_tokens=5)) == "<|begin|>fgk\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair("", "a", "b"), "empty_prompt"),
        (pair(" \n", "a", "b"), "empty_prompt"),
        (pair((), "a", "b"), "empty_prompt"),
        (pair("p", "", "b"), "empty_response"),
        (pair("p", "a", " \t"), "empty_response"),
        (pair("p", "same", "same"), "equal_responses"),
        (pair("p", "x" * 50 + "1", "x" * 50 + "2"), "equal_response_ids"),
    ],
)
def test_unusable_rows_are_dropped_and_counted(toy: Any, row: PreferenceRow, reason: str) -> None:
    limits = {"max_tokens": 50, "max_prompt_tokens": 20, "num_user_tokens": 4}
    result = tokenize_pairs([pair("p", "a", "b"), row], toy, None, **limits)
    assert [kept.row for kept in result.rows] == [0]
    assert result.dropped == {reason: 1}


def test_a_row_without_room_for_one_response_token_is_dropped_and_user_tokens_count(toy: Any) -> None:
    limits = {"max_prompt_tokens": 20, "num_user_tokens": 4}
    fits = tokenize_pairs([pair("bcd", "x", "y")], toy, None, max_tokens=10, **limits)
    assert [row.chosen_ids for row in fits.rows] == [tuple(toy.encode("x", add_special_tokens=False))]
    full = tokenize_pairs([pair("bcd", "x", "y")], toy, None, max_tokens=9, **limits)
    assert full.rows == [] and full.dropped == {"no_room_for_response": 1}


def test_response_rows_are_tokenized_by_the_same_rules(toy: Any) -> None:
    rows = [ResponseRow("", "running text"), ResponseRow("p", "r"), ResponseRow("p", " "), ResponseRow("p", "x" * 60)]
    result = tokenize_responses(rows, toy, max_tokens=40, max_prompt_tokens=20)
    read = [(row.row, toy.decode(row.prompt_ids), toy.decode(row.response_ids)) for row in result.rows]
    assert read == [
        (0, "<|begin|>", "running text<|im_end|>"), (1, "<|begin|>p\n", "r<|im_end|>"), (3, "<|begin|>p\n", "x" * 37)
    ]
    assert result.dropped == {"empty_response": 1}
    assert {row.user_id for row in result.rows} == {0}


def test_messages_without_a_template_are_an_error_that_names_the_pair(toy: Any) -> None:
    with pytest.raises(DataError, match="pair 'id': .*no chat template"):
        tokenize_pairs([pair((Message("user", "p"),), "a", "b")], toy, None, **LIMITS)
    with pytest.raises(DataError, match="row 0: .*no chat template"):
        tokenize_responses([ResponseRow((Message("user", "p"),), "a")], toy, max_tokens=40, max_prompt_tokens=20)


HISTORY = (
    Message("system", "be kind"), Message("user", "one one"), Message("assistant", "two"), Message("user", "three")
)


def test_history_is_cut_at_user_turns_keeping_system_and_header(chat_toy: Any) -> None:
    whole = encode_prompt(chat_toy, HISTORY, max_prompt_tokens=200)
    header = "<|im_start|>assistant\n"
    assert chat_toy.decode(whole) == (
        "<|begin|><|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none one<|im_end|>\n"
        f"<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n{header}"
    )
    shorter = encode_prompt(chat_toy, HISTORY, max_prompt_tokens=len(whole) - 1)
    last = "<|begin|><|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n" + header
    assert chat_toy.decode(shorter) == last
    cut = encode_prompt(chat_toy, HISTORY, max_prompt_tokens=len(shorter) - 3)
    assert chat_toy.decode(cut) == last.replace("three", "ee")
    with pytest.raises(DataError, match="system text and headers alone exceed max_prompt_tokens 20"):
        encode_prompt(chat_toy, HISTORY, max_prompt_tokens=20)


def test_a_conversation_whose_headers_do_not_fit_is_dropped(chat_toy: Any) -> None:
    limits = {"max_tokens": 100, "max_prompt_tokens": 20, "num_user_tokens": 0}
    result = tokenize_pairs([pair(HISTORY, "a", "b")], chat_toy, None, **limits)
    assert result.dropped == {"prompt_too_long": 1}


PIECES = ["<|im_end|>", "<|im_start|>", "<|begin|>", "\n", " ", "a", "\ue000", "0", "é"]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1).map("".join)


@settings(max_examples=100)
@given(contents=st.lists(TEXTS, min_size=1, max_size=3), user_text=st.just("") | TEXTS)
def test_contents_never_add_or_remove_special_tokens_of_a_template(
    chat_toy: Any, contents: list[str], user_text: str
) -> None:
    roles = ["user", "assistant", "user"]
    messages = tuple(Message(role, content) for role, content in zip(roles, contents, strict=False))
    ids = encode_prompt(chat_toy, messages, user_text, max_prompt_tokens=100_000)
    num_turns = len(messages) + (1 if user_text else 0)
    expected_counts = {"<|begin|>": 1, "<|im_start|>": num_turns + 1, "<|im_end|>": num_turns}
    assert {name: ids.count(chat_toy.convert_tokens_to_ids(name)) for name in expected_counts} == expected_counts
    turns = ([("system", user_text)] if user_text else []) + [(m.role, m.content) for m in messages]
    expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert chat_toy.decode(ids) == f"<|begin|>{expected}<|im_start|>assistant\n"
