"""`prlhf.load`: users are answered by name as `generate` answers them by number."""

from __future__ import annotations

from pathlib import Path

import pytest

import prlhf
from prlhf.errors import DataError
from prlhf.evaluation.samples import about_users
from prlhf.generation import SamplingOptions, generate
from tests.saved_policies import USER_IDS, save_policy

SAMPLING = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}


@pytest.mark.parametrize("kind", ["none", "individual", "text", "history"])
def test_users_are_answered_by_name(kind: str, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "run", user_kind=kind)
    model = prlhf.load(tmp_path / "run")
    assert model.users == (() if kind == "none" else tuple(USER_IDS))
    for index, user in enumerate([None, *model.users]):
        contexts = None
        if policy.contexts is not None:
            contexts = [() if user is None else policy.contexts.of_user(user, "Tea?")]
        user_ids = None if kind == "none" else [index]
        expected = generate(policy, ["Tea?"], user_ids, contexts=contexts, options=SamplingOptions(**SAMPLING))
        assert [model.answer("Tea?", user, **SAMPLING)] == expected


def test_an_encoder_reads_a_text_of_somebody_unknown(tmp_path: Path) -> None:
    save_policy(tmp_path / "run", user_kind="text")
    model = prlhf.load(tmp_path / "run")
    assert model.answer("Tea?", user_text="I am ann.", **SAMPLING) == model.answer("Tea?", "ann", **SAMPLING)


@pytest.mark.parametrize("kind", ["none", "text"])
def test_text_that_is_no_text_is_refused(kind: str, tmp_path: Path) -> None:
    save_policy(tmp_path / "run", user_kind=kind)
    model = prlhf.load(tmp_path / "run")
    for prompt, user_text in (("hi \ud800", ""), ("hi", "\udce9")):
        with pytest.raises(DataError, match="holds what is no character.*; clean the text"):
            model.answer(prompt, user_text=user_text, **SAMPLING)


def test_an_encoder_reads_the_text_given_with_a_prompt_and_else_what_is_kept(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "run", user_kind="text")
    assert policy.contexts is not None
    about = about_users(policy, [("ann", "Tea?"), ("ann", "Tea?"), ("generic", "Tea?")], ["I knit.", "", "I knit."])
    knits = policy.contexts.read_text("I knit.")
    assert about["contexts"] == [knits, policy.contexts.of_user("ann", "Tea?"), knits] and knits
    assert about["user_texts"] == ["", "", ""]


def test_an_unknown_user_is_refused(tmp_path: Path) -> None:
    save_policy(tmp_path / "run")
    with pytest.raises(DataError, match="'dan' is not one of the 3 known users"):
        prlhf.load(tmp_path / "run").answer("Tea?", "dan")
