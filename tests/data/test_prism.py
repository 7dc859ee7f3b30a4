"""The reader of PRISM, on lines written here with the keys of the original release."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prlhf.data.prepare import add_prepare_arguments, run_prepare
from prlhf.data.prepared import load_prepared
from prlhf.data.prism import Dialogue, describe_person, prepare_prism, read_prism, split_dialogues
from prlhf.data.records import Message, PreferenceRow
from prlhf.errors import DataError

OPTIONS: dict[str, Any] = {"unseen_users": 0.1, "eval_prompts": 0.1, "seed": 123}
RATINGS = {"values": 12, "creativity": 72, "fluency": 90, "factuality": 96, "diversity": 51, "safety": 72,
           "personalisation": 30, "helpfulness": 100, "other": 100, "other_text": "It should be fast"}
SHOWN = {"values": 1, "creativity": 4, "fluency": 7, "factuality": 5, "diversity": 2, "safety": 6,
         "personalisation": 3, "helpfulness": 8, "other": 9}


def person(number: int, **changes: Any) -> dict[str, Any]:
    """A line of survey.jsonl."""
    return {
        "user_id": f"user{number}", "survey_only": False, "num_completed_conversations": 6, "consent": "Yes, I consent",
        "consent_age": "I certify that I am 18 years of age or over", "lm_familiarity": "Somewhat familiar",
        "lm_indirect_use": "Yes", "lm_direct_use": "Unsure", "lm_frequency_use": "Once per month",
        "self_description": "I value honesty.\nAnd my cat.", "system_string": "Be truthful.",
        "age": "25-34 years old", "gender": "Female", "employment_status": "Working full-time",
        "education": "University Bachelors Degree", "marital_status": "Never been married",
        "english_proficiency": "Native speaker", "study_id": "x", "study_locale": "us",
        "religion": {"self_described": "none", "categorised": "Non-religious", "simplified": "No Affiliation"},
        "ethnicity": {"self_described": "white", "categorised": "White", "simplified": "White"},
        "location": {"birth_country": "United States", "birth_countryISO": "USA", "birth_region": "Americas",
                     "birth_subregion": "Northern America", "reside_country": "United States",
                     "reside_region": "Americas", "reside_subregion": "Northern America", "reside_countryISO": "USA",
                     "same_birth_reside_country": "Yes", "special_region": "US"},
        "lm_usecases": {"homework_assistance": 0, "research": 1, "other": 0, "other_text": None},
        "stated_prefs": RATINGS,
        "order_lm_usecases": {"homework_assistance": 2, "research": 1, "other": 19},
        "order_stated_prefs": SHOWN,
        "generated_datetime": "2023-11-22 16:25:54", "timing_duration_s": 504, "timing_duration_mins": 8.4,
        "included_in_US_REP": True, "included_in_UK_REP": False, "included_in_balanced_subset": True,
        **changes,
    }


def question(turn: int, content: str) -> dict[str, Any]:
    return {"turn": turn, "role": "user", "content": content}


def answer(turn: int, within: int, content: str, score: int, *, chosen: bool) -> dict[str, Any]:
    return {"turn": turn, "role": "model", "content": content, "model_provider": "openai", "model_name": "gpt-4",
            "score": score, "if_chosen": chosen, "within_turn_id": within}


def conversation(number: int, user: int, history: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of conversations.jsonl."""
    return {
        "conversation_id": f"c{number}", "user_id": f"user{user}", "included_in_balanced_subset": False,
        "conversation_type": "unguided", "opening_prompt": history[0]["content"],
        "conversation_turns": 1 + max(utterance["turn"] for utterance in history), "conversation_history": history,
        "performance_attributes": {"values": 50, "fluency": 90, "other": None, "other_text": None},
        "choice_attributes": {"values": 10, "fluency": 80, "other": None, "other_text": None},
        "open_feedback": "It was fine.", "generated_datetime": "2023-11-22 16:30:00", "timing_duration_s": 300,
        "timing_duration_mins": 5.0,
    }


TWO_TURNS = [
    question(0, "Why do we dream?"),
    answer(0, 0, "Nobody knows.", 40, chosen=False),
    answer(0, 1, "To sort memories.", 90, chosen=True),
    answer(0, 2, "Dreams are omens.", 5, chosen=False),
    answer(0, 3, "Nobody knows.", 41, chosen=False),
    question(1, "Do cats dream?"),
    answer(1, 0, "Yes.", 60, chosen=False),
    answer(1, 1, "Yes, as most mammals do.", 80, chosen=True),
]


def write_raw(folder: Path, people: list[dict[str, Any]], conversations: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for name, records in (("survey", people), ("conversations", conversations)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return folder


def test_every_answer_that_was_not_chosen_makes_a_pair_behind_the_chosen_history(tmp_path: Path) -> None:
    (dialogue,), left_out = read_prism(write_raw(tmp_path / "raw", [person(0)], [conversation(0, 0, TWO_TURNS)]))
    first = (Message("user", "Why do we dream?"),)
    second = (*first, Message("assistant", "To sort memories."), Message("user", "Do cats dream?"))
    assert [(row.prompt, row.chosen, row.rejected) for row in dialogue.rows] == [
        (first, "To sort memories.", "Nobody knows."),
        (first, "To sort memories.", "Dreams are omens."),
        (second, "Yes, as most mammals do.", "Yes."),
    ]
    assert {row.user_id for row in dialogue.rows} == {"user0"}
    assert left_out == {"duplicate": 1}


def test_the_user_text_names_the_best_rated_traits_and_who_the_user_is() -> None:
    """By rating helpfulness 100, factuality 96, fluency 90; values, diversity and personalisation were shown first."""
    assert describe_person(person(0), "here") == (
        "preferences: helpfulness, factuality, fluency; self-description: I value honesty.\nAnd my cat.; "
        "age: 25-34 years old; gender: Female; education: University Bachelors Degree; employment: Working full-time; "
        "marital status: Never been married; English proficiency: Native speaker"
    )
    without_answer = describe_person(person(0, gender=None), "here")
    assert "gender" not in without_answer and "age: 25-34 years old; education" in without_answer


def test_people_without_a_completed_dialogue_are_left_out(tmp_path: Path) -> None:
    people = [person(0, num_completed_conversations=0), person(1)]
    talks = [conversation(number, number, TWO_TURNS) for number in (0, 1)]
    dialogues, left_out = read_prism(write_raw(tmp_path / "raw", people, talks))
    assert [dialogue.user_id for dialogue in dialogues] == ["user1"]
    assert left_out["turn_of_user_without_completed_dialogue"] == 2


def test_a_dialogue_ends_before_a_turn_in_which_no_answer_was_chosen(tmp_path: Path) -> None:
    history = [*TWO_TURNS[:3], question(1, "And?"), answer(1, 0, "So.", 3, chosen=False), *(
        {**utterance, "turn": 2} for utterance in TWO_TURNS[5:]
    )]
    (dialogue,), left_out = read_prism(write_raw(tmp_path / "raw", [person(0)], [conversation(0, 0, history)]))
    assert [len(row.prompt) for row in dialogue.rows] == [1]
    assert left_out == {"turn_without_choice_or_behind_one": 2}


def dialogues_of(num_users: int, num_dialogues: int, *, same_pair: bool = False) -> list[Dialogue]:
    return [
        Dialogue(f"user{user}", [
            PreferenceRow("p", f"user{user}", (Message("user", "Hi" if same_pair else f"{user} {number}"),), "a", "b")
        ])
        for user in range(num_users) for number in range(num_dialogues)
    ]


def test_the_split_draws_users_and_dialogues_in_the_authors_order() -> None:
    """Theirs: legacy seed, users shuffled, the first 90% seen, each one's dialogues shuffled, 90% of them train."""
    data, _ = split_dialogues(dialogues_of(20, 6), source="x", seed=123, unseen_users=0.1, eval_dialogues=0.1)
    legacy = np.random.RandomState(123)
    users = np.array([f"user{user}" for user in range(20)])
    legacy.shuffle(users)
    expected = []
    for user in users[: int(20 * 0.9)]:
        numbers = np.arange(6)
        legacy.shuffle(numbers)
        expected += [f"{user.removeprefix('user')} {number}" for number in numbers[int(6 * 0.9) :]]
    assert [row.prompt[0].content for row in data.eval_seen] == expected  # type: ignore[union-attr]
    assert data.user_ids() == list(users[:18])
    assert {row.user_id for row in data.eval_unseen} == set(users[18:])
    assert len(data.train) + len(data.dev) == 18 * 5 and len(data.dev) == round(0.05 * 18 * 4)


def test_users_with_one_dialogue_count_as_unseen_and_every_seen_user_trains() -> None:
    both = [*dialogues_of(30, 2), *dialogues_of(40, 1)[30:]]
    data, _ = split_dialogues(both, source="x", seed=1, unseen_users=0.0, eval_dialogues=0.1)
    assert set(data.user_ids()) == {f"user{number}" for number in range(30)} == {row.user_id for row in data.train}
    assert len(data.train) == len(data.eval_seen) == 30 and len(data.eval_unseen) == 10


def test_a_pair_in_two_dialogues_stays_in_evaluation_alone() -> None:
    data, num_shared = split_dialogues(
        [*dialogues_of(10, 6), *dialogues_of(10, 2, same_pair=True)], source="x", seed=1,
        unseen_users=0.1, eval_dialogues=0.2,
    )
    training = {row.prompt for row in (*data.train, *data.dev)}
    assert any(row.prompt[0].content == "Hi" for row in data.eval_seen)  # type: ignore[union-attr]
    assert (Message("user", "Hi"),) not in training and num_shared > 0


def test_the_prepared_directory_keeps_each_text_once_and_gives_it_to_every_row(tmp_path: Path) -> None:
    people = [person(number, age=f"{number} years old") for number in range(10)]
    talks = [
        conversation(10 * user + number, user, [{**each, "content": f"{user} {number} {each['content']}"}
                                                for each in TWO_TURNS])
        for user in range(10) for number in range(4)
    ]
    prepare_prism(write_raw(tmp_path / "raw", people, talks), tmp_path / "out", **OPTIONS)
    users = json.loads((tmp_path / "out" / "users.json").read_text())
    assert [list(users.values())[i]["split"] for i in (0, 8, 9)] == ["seen", "seen", "unseen"]
    assert "user_text" not in (tmp_path / "out" / "train.jsonl").read_text()
    data = load_prepared(tmp_path / "out")
    for row in (*data.train, *data.dev, *data.eval_seen, *data.eval_unseen):
        assert f"; age: {row.user_id.removeprefix('user')} years old; " in row.user_text
        assert row.user_text == users[row.user_id]["user_text"]
    assert len(data.eval_unseen) == 4 * 3 and len(data.eval_seen) == 9 * 3


def test_the_command_holds_out_a_tenth_of_the_people_unless_told_otherwise(tmp_path: Path) -> None:
    talks = [conversation(2 * user + number, user, [{**each, "content": f"{user} {number} {each['content']}"}
                                                    for each in TWO_TURNS]) for user in range(20) for number in (0, 1)]
    raw = write_raw(tmp_path / "raw", [person(number) for number in range(20)], talks)
    parser = argparse.ArgumentParser()
    add_prepare_arguments(parser)
    for share, num_unseen in ((None, 2), ("0.5", 10)):
        options = [] if share is None else ["--unseen-users", share]
        out = tmp_path / str(share)
        assert run_prepare(parser.parse_args(["prism", "--raw", str(raw), "--out", str(out), *options])) == 0
        assert len({row.user_id for row in load_prepared(out).eval_unseen}) == num_unseen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": "user7"}, "conversations.jsonl:1: user 'user7' is not in survey.jsonl"),
        ({"conversation_history": None}, "conversations.jsonl:1: conversation_history is None"),
        ({"conversation_history": [{"role": "bot", "turn": 0}]}, "conversations.jsonl:1: conversation_history holds"),
        ({"conversation_history": [{"role": "user", "turn": 0}]}, "conversations.jsonl:1: content is None"),
        ({"conversation_history": [{"role": "model", "turn": 0, "content": "x"}]}, ":1: if_chosen is None"),
    ],
)
def test_malformed_conversations_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    raw = write_raw(tmp_path / "raw", [person(0)], [{**conversation(0, 0, TWO_TURNS), **change}])
    with pytest.raises(DataError) as caught:
        read_prism(raw)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stated_prefs": None}, "survey.jsonl:1: stated_prefs is None"),
        ({"age": 31}, "survey.jsonl:1: age is 31"),
        ({"num_completed_conversations": "6"}, "survey.jsonl:1: num_completed_conversations is '6'"),
    ],
)
def test_malformed_people_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    raw = write_raw(tmp_path / "raw", [person(0, **change)], [conversation(0, 0, TWO_TURNS)])
    with pytest.raises(DataError) as caught:
        read_prism(raw)
    assert message in str(caught.value)


def test_a_question_without_answers_and_missing_files_are_refused(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", [person(0)], [conversation(0, 0, [question(0, "Anyone?")])])
    with pytest.raises(DataError, match="no dialogue with a chosen and another answer"):
        prepare_prism(raw, tmp_path / "out", **OPTIONS)
    with pytest.raises(DataError, match="survey.jsonl: cannot be read"):
        read_prism(tmp_path)
