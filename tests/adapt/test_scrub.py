"""An id counts where it is a whole JSON string, and lines that do not name it stay byte for byte."""

from __future__ import annotations

import json

import pytest

from prlhf.adapt.scrub import drop_row, scrub, scrub_line


def test_a_users_entries_and_records_go_and_nothing_else():
    value = {
        "per_user": {"ann": {"accuracy": 1.0}, "anna": {"accuracy": 0.5}},
        "slices": {"length_gap_20": {"per_unseen_user": {"ann": 1}}},
        "on_side": {"ann": 1.0, "bob": 0.5},
        "rows": [{"user_id": "ann", "response": "x"}, {"user_id": "bob", "response": "ann"}],
        "mean": 0.75,
    }
    kept, count = scrub(value, "ann")
    assert kept == {
        "per_user": {"anna": {"accuracy": 0.5}},
        "slices": {"length_gap_20": {"per_unseen_user": {}}},
        "on_side": {"bob": 0.5},
        "rows": [{"user_id": "bob", "response": "ann"}],
        "mean": 0.75,
    }
    assert count == 4
    assert scrub(kept, "ann") == (kept, 0)


@pytest.mark.parametrize("user", ["per_user", "accuracy", "user_id", "seen", "finished", "user", "bob"])
def test_an_id_may_be_any_word_of_ours(user: str) -> None:
    turns = [{"role": "user", "content": "finished"}]
    others = {"per_user": {"ann": {"accuracy": 1.0}}, "accuracy": {"seen": {"mean": 1.0}}, "status": "finished",
              "words": {"per_user": {"ann": 9.0}}, "rows": [{"user_id": "ann", "prompt": turns, "response": "bob"}]}
    assert scrub(others, user) == (others, 0)
    line = json.dumps(others["rows"][0]).encode() + b"\n"  # type: ignore[index]
    assert scrub_line(line, user, ()) == line == drop_row(line, user)


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("user", ["ann", "Ā/../bob", 'quo"te\\', "\ud800"])
def test_a_line_is_known_however_its_json_is_written(user: str, ensure_ascii: bool) -> None:
    line = json.dumps({"user_id": user, "n": 1}, ensure_ascii=ensure_ascii).encode("utf-8", "surrogatepass") + b"\n"
    assert scrub_line(line, user, ()) is None
    assert drop_row(line, user) is None
    assert scrub_line(line, f"{user}x", ()) == line == drop_row(line, f"{user}x")


def test_a_line_with_one_of_the_users_texts_goes_and_a_broken_one_with_the_id():
    line = b'{"user_id":  "bob", "prompt": [{"role": "user", "content": "my secret"}]}\n'
    assert scrub_line(line, "ann", {"my secret"}) is None
    assert scrub_line(line, "ann", {"user", "secret"}) == line
    assert scrub_line(b'{"user_id": "ann", "resp', "ann", ()) is None
    assert scrub_line(b'{"user_id": "anna", "resp', "ann", ()) == b'{"user_id": "anna", "resp'


def test_a_line_that_is_not_the_users_loses_the_users_entry():
    assert scrub_line(b'{"step": 1, "per_user": {"ann": 1, "bob": 2}}\n', "ann", ()) == (
        b'{"step": 1, "per_user": {"bob": 2}}\n'
    )


def test_a_row_of_data_goes_by_its_user_alone():
    line = b'{"user_id": "bob", "prompt": "ann"}\n'
    assert drop_row(line, "ann") == line
