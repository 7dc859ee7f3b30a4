"""Answers for every user, and what judge and reference say of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from prlhf.data.records import Message, Prompt, ResponseRow
from prlhf.data.tokenize import TokenizedResponse, tokenize_responses
from prlhf.engine.build import Job
from prlhf.errors import DataError
from prlhf.evaluation.judges import LengthJudge, RuleJudge
from prlhf.evaluation.samples import (
    Sample,
    judge_generations,
    judge_samples,
    known_users,
    sample_answers,
    score_under_reference,
    text_quality,
    user_indices,
    win_rates,
    words_per_user,
)
from prlhf.generation import SamplingOptions
from prlhf.models import PolicySpec, make_policy
from tests.tiny_run import Tiny, perturbed_job

SHORT, LONG, MIDDLING = ("word " * count for count in (5, 40, 27))  # P2A likes concise answers, P2B informative ones


def sample(user: str, response: str, prompt: Prompt = "Why?", nll: float = 1.0) -> Sample:
    return Sample(user, prompt, response, nll, 3)


@pytest.fixture
def job(tiny: Tiny) -> Job:
    return perturbed_job(tiny.config())


def score(job: Job, answers: Sequence[tuple[str, Prompt, str]]) -> list[Sample]:
    def tokenize(answers: Sequence[tuple[str, Prompt, str]]) -> list[TokenizedResponse]:
        rows = [ResponseRow(prompt, answer) for _, prompt, answer in answers]
        limits = {"max_tokens": 200, "max_prompt_tokens": 64, "num_user_tokens": 3}
        return tokenize_responses(rows, job.model.tokenizer, **limits).rows

    return score_under_reference(job.model, answers, tokenize, pad_id=job.pad_id, microbatch_tokens=500)


def test_nll_is_the_frozen_models_own_mean_over_answer_and_eos(job: Job) -> None:
    """From the bare weights: BOS, prompt and a newline, then the answer and EOS are scored; NaN where nothing is."""
    answers = [("ann", "Tell me", "of bees"), ("bob", "Tell me", ""), ("ann", "Why?", "It is so, and more of it")]
    samples = score(job, answers)
    assert [(s.user_id, s.prompt, s.response) for s in samples] == answers
    assert math.isnan(samples[1].nll_per_token) and samples[1].num_tokens == 0
    tokenizer, backbone = job.model.tokenizer, job.model.backbone
    for i in (0, 2):
        _, prompt, answer = answers[i]
        head = [tokenizer.bos_token_id, *tokenizer(f"{prompt}\n", add_special_tokens=False).input_ids]
        tail = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with job.model.reference.active(), torch.no_grad():
            logits = backbone(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        expected = F.cross_entropy(logits, torch.tensor(tail)).item()
        assert samples[i].nll_per_token == pytest.approx(expected, abs=1e-5)
        assert samples[i].num_tokens == len(tail)


def test_every_user_answers_every_prompt_in_order(job: Job) -> None:
    seen = {}

    def keep(answers: Sequence[tuple[str, Prompt, str]]) -> list[Sample]:
        seen["answers"] = list(answers)
        return []

    options = SamplingOptions(max_new_tokens=8, temperature=0.0)
    by_reference = {}
    for as_reference in (False, True):
        sample_answers(
            job.model, ["One?", "Two, and longer?"], ["ann", "generic", "bob"], options=options,
            as_reference=as_reference, max_prompt_tokens=64, batch_rows=4, score=keep,
        )
        by_reference[as_reference] = seen["answers"]
    for answers in by_reference.values():
        assert [answer[:2] for answer in answers] == [
            (user, prompt) for user in ("ann", "generic", "bob") for prompt in ("One?", "Two, and longer?")
        ]
    texts = [answer for *_, answer in by_reference[True]]
    assert texts[:2] == texts[2:4] == texts[4:], "the reference knows no user, and greedy answers do not vary"
    assert [answer for *_, answer in by_reference[False]] != texts


@pytest.mark.parametrize("as_reference", [False, True])
def test_what_is_known_about_a_user_stands_in_front_of_the_users_prompts_alone(job: Job, as_reference: bool) -> None:
    options = SamplingOptions(max_new_tokens=6, temperature=0.0)

    def answers(**settings: Any) -> list[str]:
        samples = sample_answers(
            job.model, ["One?"], ["ann", "bob"], options=options, as_reference=as_reference, max_prompt_tokens=64,
            batch_rows=4, score=lambda given: given, **settings,
        )
        return [answer for *_, answer in samples]

    plain, with_text = answers(), answers(user_texts={"bob": "I sail."})
    in_the_prompt = sample_answers(
        job.model, ["I sail.\nOne?"], ["bob"], options=options, as_reference=as_reference, max_prompt_tokens=64,
        batch_rows=4, score=lambda given: given,
    )
    assert with_text == [plain[0], in_the_prompt[0][-1]] and with_text[1] != plain[1]


def test_generic_is_0_and_known_users_count_from_1(job: Job, tiny: Tiny) -> None:
    assert user_indices(job.model, ["bob", "generic", "ann"]) == [2, 0, 1]
    with pytest.raises(DataError, match="anne"):
        user_indices(job.model, ["anne"])


@pytest.mark.parametrize(("asked", "expected"), [
    ("all", ["ann", "Ng, bob", "-x"]),
    (None, ["ann", "Ng, bob", "-x"]),
    ("Ng, bob", ["Ng, bob"]),
    ("-x,generic,ann,-x", ["-x", "generic", "ann"]),
    (["Ng, bob", "ann"], ["Ng, bob", "ann"]),
])
def test_an_id_with_a_comma_is_asked_for_as_a_whole(asked: str | list[str] | None, expected: list[str]) -> None:
    model = make_policy(PolicySpec("builtin:tiny", user_kind="individual"), ["ann", "Ng, bob", "-x"])
    assert known_users(model, asked) == expected
    with pytest.raises(DataError) as refusal:
        known_users(model, "ann,Ng, bo")
    assert len(refusal.value.messages) == 2


def test_a_policy_without_users_has_no_indices(tiny: Tiny) -> None:
    assert user_indices(perturbed_job(tiny.config(method="dpo")).model, ["ann"]) is None


def test_the_judge_is_asked_about_each_users_own_taste() -> None:
    samples = [sample("P2A", SHORT), sample("P2A", LONG), sample("P2A", MIDDLING), sample("P2A", SHORT)]
    samples += [sample("P2B", LONG)]
    judged = judge_samples(samples, RuleJudge())
    assert {user: figures["on_side"] for user, figures in judged.items()} == {"P2A": 0.5, "P2B": 1.0}
    assert judged["P2A"]["num_samples"] == 4


def test_text_quality_leaves_empty_answers_out_of_the_nll() -> None:
    samples = [sample("P2A", "a b c d a b c d", nll=2.0), sample("P2A", "", nll=math.nan), sample("P2A", "x", nll=4.0)]
    quality = text_quality(samples, RuleJudge())
    assert quality["nll_per_token"] == 3.0
    assert (quality["empty"], quality["num_samples"]) == (1, 3)
    assert quality["words"] == pytest.approx((8 + 0 + 1) / 3)
    assert quality["repeated_4grams"] == pytest.approx(1 / 5), "of abcd bcda cdab dabc abcd the last"
    assert quality["well_formed"] == 0.0


def test_answers_that_are_all_empty_have_no_nll() -> None:
    assert text_quality([sample("P2A", "", nll=math.nan)], RuleJudge())["nll_per_token"] is None


def test_words_are_counted_for_each_user_the_generic_one_and_the_reference() -> None:
    policy = [sample("ann", "one two"), sample("ann", "one two three four"), sample("bob", "")]
    reference = [sample("ann", "one"), sample("bob", "one two")]
    generic = [sample("generic", "one two three")]
    words = words_per_user({"policy": policy, "reference": reference, "generic": generic})
    assert words == {"per_user": {"ann": 3.0, "bob": 0.0}, "generic": 3.0, "reference": 1.5}
    assert words_per_user({"policy": policy, "reference": reference})["generic"] is None, "a model without users"


def test_wins_ties_and_losses_are_counted_answer_by_answer() -> None:
    """P2A: short beats long (win), both on side (tie), loses once; P2B: neither on side (tie)."""
    ours = [sample("P2A", SHORT), sample("P2A", SHORT), sample("P2A", LONG), sample("P2B", SHORT)]
    theirs = [sample("P2A", LONG), sample("P2A", SHORT), sample("P2A", SHORT), sample("P2B", MIDDLING)]
    assert win_rates(ours, theirs, RuleJudge(), opponent="reference") == {
        "judge": "rule", "opponent": "reference", "rule": "a tie is half a win",
        "wins": 1, "ties": 2, "losses": 1, "mean": 0.5,
        "per_user": {
            "P2A": {"wins": 1, "ties": 1, "losses": 1, "mean": 0.5},
            "P2B": {"wins": 0, "ties": 1, "losses": 0, "mean": 0.5},
        },
    }


def test_answers_judged_by_length_have_scores_and_win_rates_but_no_side() -> None:
    ours = [sample("ann", "ab"), sample("bob", "ab"), sample("bob", "", nll=math.nan)]
    theirs = [sample("ann", "abcd"), sample("bob", "abcd"), sample("bob", "abcd")]
    samples = {"policy": ours, "reference": theirs, "generic": [sample("generic", "x")]}
    judged = judge_generations(samples, LengthJudge({"ann": False, "bob": True}), temperature=0.5)
    assert [s.score for s in judged["samples"]["policy"]] == [1 / 2, 2.0, 0.0]
    assert [s.score for s in judged["samples"]["reference"]] == [1 / 4, 4.0, 4.0]
    assert judged["samples"]["generic"] == samples["generic"], "written for nobody"
    assert judged["samples"]["policy"][0].record()["score"] == 0.5
    win_rate = judged["win_rate"]
    assert [win_rate[key] for key in ("judge", "wins", "ties", "losses")] == ["length", 1, 0, 2]
    assert judged["on_side"] is None and "on_side" not in judged["text"]["policy"]["per_user"]["ann"]
    assert (judged["text"]["policy"]["well_formed"], judged["text"]["policy"]["empty"]) == (None, 1)


def test_lists_that_answer_different_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="different prompts or users"):
        win_rates([sample("P2A", SHORT)], [sample("P2A", SHORT, "How?")], RuleJudge(), opponent="other")


def test_a_record_is_valid_json_also_for_an_empty_answer() -> None:
    turns = (Message("user", "Why?"),)
    record = sample("Ā/../", "", turns, nll=math.nan).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "user_id": "Ā/../", "prompt": [{"role": "user", "content": "Why?"}], "response": "",
        "nll_per_token": None, "num_tokens": 3,
    }
