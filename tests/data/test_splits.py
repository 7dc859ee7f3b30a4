"""Splits by prompt and by user."""

from __future__ import annotations

import pytest

from prlhf.data.records import Message, PreferenceRow, ResponseRow
from prlhf.data.splits import draw, prompt_group, split_preferences, split_responses
from prlhf.errors import DataError

USERS = [f"u{number}" for number in range(10)]
PROMPTS = [f"prompt {number}" for number in range(100)]
ROWS = [PreferenceRow(f"{prompt}", user, prompt, "a", "b") for prompt in PROMPTS for user in USERS]
SHARES = {"eval_prompts": 0.2, "unseen_users": 0.3}


def test_no_evaluation_prompt_and_no_unseen_user_occurs_in_training() -> None:
    split = split_preferences(ROWS, source="test", seed=5, **SHARES)
    data = split.data
    parts = {"train": data.train, "dev": data.dev, "eval_seen": data.eval_seen, "eval_unseen": data.eval_unseen}
    users = {name: {row.user_id for row in rows} for name, rows in parts.items()}
    prompts = {name: {row.prompt for row in rows} for name, rows in parts.items()}
    assert len(users["train"]) == 7 and len(users["eval_unseen"]) == 3
    assert users["train"] == users["dev"] == users["eval_seen"] and not users["train"] & users["eval_unseen"]
    assert len(prompts["eval_seen"]) == 20 and prompts["eval_seen"] == prompts["eval_unseen"]
    assert len(prompts["dev"]) == 4 and len(prompts["train"]) == 76
    assert not prompts["train"] & prompts["dev"] and not (prompts["train"] | prompts["dev"]) & prompts["eval_seen"]
    assert split.num_left_out == 80 * 3
    assert len(data.train) + len(data.dev) + len(data.eval_seen) + len(data.eval_unseen) == len(ROWS) - 240


def test_the_same_seed_gives_the_same_split_in_the_order_of_the_file_and_another_seed_another() -> None:
    first, again, other = (split_preferences(ROWS, source="test", seed=seed, **SHARES).data for seed in (1, 1, 2))
    assert first == again and first.eval_seen != other.eval_seen
    positions = [ROWS.index(row) for row in first.train[:50]]
    assert positions == sorted(positions)


def test_the_prompts_held_out_do_not_depend_on_the_share_of_unseen_users() -> None:
    some, none = (
        split_preferences(ROWS, source="test", seed=1, eval_prompts=0.2, unseen_users=share).data
        for share in (0.3, 0.0)
    )
    assert {row.prompt for row in some.eval_seen} == {row.prompt for row in none.eval_seen}
    assert none.eval_unseen == []


def test_a_user_whose_every_prompt_was_drawn_for_evaluation_counts_as_unseen() -> None:
    rows = [PreferenceRow(prompt, f"only {prompt}", prompt, "a", "b") for prompt in PROMPTS]
    data = split_preferences(rows, source="test", seed=0, eval_prompts=0.2, unseen_users=0.0).data
    assert data.eval_seen == [] and len(data.eval_unseen) == 20 and data.dev == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Why  so?", "why so?\n"),
        ((Message("system", "x"), Message("user", "Hi")), (Message("user", "hi"), Message("assistant", "a"))),
    ],
)
def test_prompts_that_differ_in_case_spacing_or_later_turns_stay_together(first: object, second: object) -> None:
    assert prompt_group(ResponseRow(first, "")) == prompt_group(ResponseRow(second, ""))
    assert prompt_group(ResponseRow(first, "")) != prompt_group(ResponseRow("other", ""))


@pytest.mark.parametrize(
    ("num_keys", "share", "expected"), [(10, 0.0, 0), (1, 0.5, 0), (10, 0.01, 1), (10, 0.99, 9), (32, 0.2, 6)]
)
def test_draw_takes_the_rounded_share_at_least_one_and_never_all(num_keys: int, share: float, expected: int) -> None:
    assert len(draw(list(range(num_keys)), share, seed=[0])) == expected


@pytest.mark.parametrize("shares", [{"eval_prompts": 1.0}, {"unseen_users": -0.1}, {"eval_prompts": 10}])
def test_impossible_shares_are_refused_by_name(shares: dict[str, float]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(shares))} is .*expected a share"):
        split_preferences(ROWS, source="test", seed=0, **{**SHARES, **shares})


def test_a_split_without_training_rows_is_an_error_that_says_what_to_do() -> None:
    rows = [PreferenceRow("1", "a", "p", "x", "y"), PreferenceRow("2", "b", "q", "x", "y")]
    with pytest.raises(DataError, match="no training row is left.*lower them"):
        for seed in range(20):
            split_preferences(rows, source="test", seed=seed, eval_prompts=0.5, unseen_users=0.5)


def test_responses_split_by_prompt_and_running_text_row_by_row() -> None:
    rows = [ResponseRow(f"p{number % 50}", str(number)) for number in range(100)]
    train, dev = split_responses(rows, seed=0)
    assert len({row.prompt for row in dev}) == round(0.05 * 50)
    assert not {row.prompt for row in dev} & {row.prompt for row in train} and len(train) + len(dev) == 100
    _, dev = split_responses([ResponseRow("", str(number)) for number in range(100)], seed=0)
    assert len(dev) == 5
