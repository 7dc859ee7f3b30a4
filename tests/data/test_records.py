"""Rows and user indices."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prlhf.data.records import (
    Message,
    PreferenceData,
    PreferenceRow,
    ResponseRow,
    labelled_row,
    make_pair_id,
    pair_content,
    preference_row,
    record_from_row,
    response_row,
)
from prlhf.data.user_index import GENERIC_USER_ID, UserIndex
from prlhf.errors import DataError

ROW = {"user_id": "u", "prompt": "p", "chosen": "c", "rejected": "r"}


def row(user_id: str) -> PreferenceRow:
    return PreferenceRow("1", user_id, "p", "c", "r")


def test_user_ids_are_numbered_from_one_in_order_of_first_appearance() -> None:
    data = PreferenceData([row("b"), row("a"), row("b")], [], [row("z")], [], "test")
    index = UserIndex(data.user_ids())
    assert [(index.index(user), index.user_id(index.index(user))) for user in ("b", "a")] == [(1, "b"), (2, "a")]
    assert len(index) == 2 and "z" not in index
    assert GENERIC_USER_ID == 0


def test_declared_users_fix_the_order_even_without_training_rows() -> None:
    data = PreferenceData([row("b")], [], [], [], "test", declared_users=("a", "b"))
    assert data.user_ids() == ["a", "b"]


def test_pair_id_does_not_depend_on_the_verdict_but_on_every_text() -> None:
    assert make_pair_id("p", "a", "b") == make_pair_id("p", "b", "a")
    others = [("q", "a", "b"), ("p", "a", "c"), ((Message("user", "p"),), "a", "b"), ("pa", "", "b")]
    assert len({make_pair_id("p", "a", "b"), *(make_pair_id(*other) for other in others)}) == 5
    assert pair_content(PreferenceRow("", "u", "p", "a", "b")) == pair_content(PreferenceRow("x", "v", "p", "b", "a"))


def test_explicit_preference_rows_of_trl_load_as_they_are() -> None:
    plain = preference_row({**ROW, "score_chosen": 3}, "f:1")
    assert plain == PreferenceRow(make_pair_id("p", "c", "r"), "u", "p", "c", "r", "")
    conversational = {
        "user_id": "u",
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"role": "assistant", "content": "c"}],
        "rejected": [{"role": "assistant", "content": "r"}],
    }
    loaded = preference_row(conversational, "f:1")
    assert (loaded.prompt, loaded.chosen, loaded.rejected) == ((Message("user", "p"),), "c", "r")


@pytest.mark.parametrize("prompt", ["p", (Message("system", "s"), Message("user", "p"))])
@pytest.mark.parametrize("user_text", ["", "likes cats"])
def test_a_row_survives_its_json_record(prompt: str, user_text: str) -> None:
    original = PreferenceRow("id", "u", prompt, "c", "r", user_text)
    assert preference_row(record_from_row(original), "f:1") == original
    response = ResponseRow(prompt, "r", user_text)
    assert response_row(record_from_row(response), "f:1") == response


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": None}, "user_id is null"),
        ({"user_id": 7}, "user_id is 7, expected a string"),
        ({"user_id": ""}, "user_id is empty"),
        ({"chosen": ["x"]}, "chosen holds 'x'"),
        ({"chosen": 1.5}, "chosen is 1.5"),
        ({"prompt": [{"role": "user"}]}, "prompt holds"),
        ({"prompt": {"text": "p"}}, "prompt is"),
        ({"rejected": [{"role": "user", "content": "r"}]}, "expected one assistant turn"),
        ({"pair_id": 3}, "pair_id is 3"),
        ({"user_text": []}, "user_text is"),
    ],
)
def test_malformed_rows_are_refused_with_place_and_field(change: dict, message: str) -> None:
    with pytest.raises(DataError) as caught:
        preference_row({**ROW, **change}, "data.jsonl:12")
    assert str(caught.value).startswith("data.jsonl:12: ") and message in str(caught.value)


def test_a_misspelt_field_is_suggested() -> None:
    with pytest.raises(DataError, match="no 'chosen' among .*did you mean 'choosen'"):
        preference_row({"user_id": "u", "prompt": "p", "choosen": "c", "rejected": "r"}, "f:1")


def test_sft_reads_text_prompt_and_response_or_the_chosen_side() -> None:
    assert response_row({"text": "t"}, "f:1") == ResponseRow("", "t")
    assert response_row({"prompt": "p", "response": "r"}, "f:1") == ResponseRow("p", "r")
    assert response_row({**ROW, "user_text": "x"}, "f:1") == ResponseRow("p", "c", "x")
    with pytest.raises(DataError, match='f:1: has the keys .*expected {"text"}'):
        response_row({"prompt": "p", "answer": "r"}, "f:1")


@pytest.mark.parametrize("read", [preference_row, labelled_row])
@pytest.mark.parametrize("word", ["generic", "all"])
def test_ids_that_commands_take_for_something_else_are_refused(read: Callable[..., object], word: str) -> None:
    record = {"user_id": word, "prompt": "Q", "chosen": "a", "rejected": "b", "response": "a", "label": True}
    with pytest.raises(DataError, match=f"rows:3: user '{word}': names .* give the user another id"):
        read(record, "rows:3")
    read({**record, "user_id": word.upper()}, "rows:3")
