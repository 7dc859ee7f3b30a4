"""What is known about a user in words: prompt text in both terms and in evaluation, or in none of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import prlhf
from prlhf.cli import main
from prlhf.data.collate import collate_pairs
from prlhf.data.records import Message, PreferenceRow
from prlhf.data.tokenize import TokenizedPair, tokenize_pairs
from prlhf.engine import final
from prlhf.engine.build import Job, tokenize_limits
from prlhf.engine.checkpoint import Progress
from prlhf.engine.objective import ReferenceLogps
from prlhf.engine.score import score_file
from prlhf.engine.trainer import save_job
from prlhf.evaluation import baselines
from prlhf.generation import SamplingOptions, generate
from prlhf.models import PersonalizedPolicy
from tests.tiny_run import Tiny, perturbed_job, write_jsonl


@pytest.fixture
def texts(tiny: Tiny, tmp_path: Path) -> Path:
    """The tiny data with a text about ann, who is seen, and about cat, who is not."""
    data = tmp_path / "texts"
    shutil.copytree(tiny.data, data)
    users = {
        "ann": {"user_text": "I sail.", "split": "seen"}, "bob": {"split": "seen"},
        "cat": {"user_text": "I knit.", "split": "unseen"},
    }
    (data / "users.json").write_text(json.dumps(users))
    return data


@pytest.mark.parametrize(("method", "alpha"), [("pdpo", 0.0), ("pdpo", 0.5), ("prm", 0.0)])
def test_the_generic_term_keeps_the_users_text_and_drops_only_the_id(
    tiny: Tiny, texts: Path, method: str, alpha: float
) -> None:
    """The figures of the generic term are those of rows that spell the text out in the prompt, under the user 0."""
    settings: dict[str, Any] = {"method": method, "loss__alpha": alpha, "data__source": str(texts)}
    job = perturbed_job(tiny.config(**settings))
    row = next(row for row in job.rows if row.user_id == 1)
    assert isinstance(row, TokenizedPair) and job.preferences is not None
    source = job.preferences.train[row.row]
    spelled = dataclasses.replace(source, prompt=f"I sail.\n{source.prompt}", user_text="")
    bare = dataclasses.replace(source, user_text="")

    def generic_margin(rows: Sequence[TokenizedPair]) -> float:
        reference = ReferenceLogps(torch.zeros(1), torch.zeros(1))
        sums = job.objective(job.model, collate_pairs(rows, job.pad_id), reference).sums
        return float(sums["generic/rewards/margins"])

    def as_user_0(changed: PreferenceRow) -> list[TokenizedPair]:
        return tokenize_pairs([changed], job.model.tokenizer, None, **tokenize_limits(job.config, job.model)).rows

    assert generic_margin([row]) == pytest.approx(generic_margin(as_user_0(spelled)), abs=1e-6)
    assert abs(generic_margin([row]) - generic_margin(as_user_0(bare))) > 1e-4


@pytest.mark.parametrize("setting", ["prompt", "none"])
def test_the_users_text_is_in_the_prompts_of_training_and_evaluation_or_in_neither(
    tiny: Tiny, texts: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = perturbed_job(tiny.config(data__source=str(texts), data__user_text=setting))
    assert job.preferences is not None
    scored: list[TokenizedPair] = []
    score_pairs = final.score_pairs
    monkeypatch.setattr(final, "score_pairs", lambda model, rows, tokenized, *args, **options: (
        scored.extend(tokenized), score_pairs(model, rows, tokenized, *args, **options))[1])
    evaluator = final.Evaluator(job.config, job.model, pad_id=0, autocast=job.autocast, on_batch=lambda: None)
    evaluator.accuracy([], job.preferences.eval_unseen)
    for user_id, text, rows in ((1, "I sail.", job.rows), (0, "I knit.", scored)):
        prompts = [job.model.tokenizer.decode(row.prompt_ids) for row in rows if row.user_id == user_id]
        assert prompts and all((text in prompt) == (setting == "prompt") for prompt in prompts)
    assert all(row.user_text for row in job.preferences.eval_unseen), "user models read it either way"


@pytest.mark.parametrize("setting", ["prompt", "none"])
@pytest.mark.parametrize("turns", [False, True], ids=["text", "conversation"])
def test_the_baselines_prompts_hold_the_users_text_where_training_has_it_there(
    tiny: Tiny, texts: Path, setting: str, turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the wish or the pairs in front, and bare."""
    job = perturbed_job(tiny.config(data__source=str(texts), data__user_text=setting))
    assert job.preferences is not None
    data = dataclasses.replace(job.preferences, preferences={"ann": "Be short.", "bob": "Say more."})
    if turns:
        job.model.tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
        rows = [dataclasses.replace(row, prompt=(Message("user", str(row.prompt)),)) for row in data.eval_seen]
        data = dataclasses.replace(data, eval_seen=rows)
    scored: list[TokenizedPair] = []
    score = baselines.score_pair_responses
    monkeypatch.setattr(baselines, "score_pair_responses", lambda model, rows, *args, **options: (
        scored.extend(rows), score(model, rows, *args, **options))[1])
    evaluator = final.Evaluator(job.config, job.model, pad_id=0, autocast=job.autocast, on_batch=lambda: None)
    blocks = evaluator.baselines(data)
    assert blocks["prompted"] and blocks["few_shot"]
    assert all(row.user_text for row in data.eval_seen if row.user_id == "ann")
    prompts = {name: [job.model.tokenizer.decode(ids.prompt_ids) for ids in scored
                      if data.eval_seen[ids.row].user_id == name] for name in ("ann", "bob")}
    for front in ("Be short.", "How I judged other answers:"):
        assert any(front in prompt for prompt in prompts["ann"])
    assert all(("I sail." in prompt) == (setting == "prompt") for prompt in prompts["ann"])
    assert not any("I sail." in prompt for prompt in prompts["bob"])


def saved_job(tiny: Tiny, texts: Path, run_dir: Path, **settings: Any) -> Job:
    job = perturbed_job(tiny.config(data__source=str(texts), **settings))
    save_job(job, Progress(step=1), run_dir)
    return job


@pytest.mark.parametrize("setting", ["prompt", "none"])
def test_a_known_user_is_scored_behind_their_own_text_unless_the_line_gives_one(
    tiny: Tiny, texts: Path, setting: str, tmp_path: Path
) -> None:
    saved_job(tiny, texts, tmp_path / "run", method="prm", data__user_text=setting)
    line = {"prompt": "Why?", "chosen": "It is so.", "rejected": "No."}
    lines = [line, *({**line, "user_text": text} for text in ("I sail.", "I knit."))]
    records = score_file(tmp_path / "run", write_jsonl(tmp_path / "f.jsonl", lines), ["ann", "bob", "generic"])
    scores = {(record["user_id"], record["line"]): record["chosen"] for record in records}
    assert scores["ann", 1] == pytest.approx(scores["ann", 2], abs=1e-6)
    assert (abs(scores["ann", 3] - scores["ann", 1]) > 1e-4) == (setting == "prompt")
    for user in ("bob", "generic"):
        assert (abs(scores[user, 1] - scores[user, 2]) > 1e-4) == (setting == "prompt"), "nothing is said about them"


@pytest.mark.parametrize("kind", ["individual", "text", "history"])
@pytest.mark.parametrize("setting", ["prompt", "none"])
def test_a_known_user_is_answered_behind_their_own_text_unless_another_is_given(
    tiny: Tiny, texts: Path, kind: str, setting: str, tmp_path: Path
) -> None:
    """By `generate` and `prlhf.load`, as in the run's own evaluation."""
    job = saved_job(tiny, texts, tmp_path / "run", user__kind=kind, data__user_text=setting)
    policy = job.model.eval()
    assert isinstance(policy, PersonalizedPolicy)
    options = SamplingOptions(max_new_tokens=8, temperature=0.0)

    def expected(user: str | None, before: str, read: str | None = None) -> str:
        contexts = None
        if policy.contexts is not None:
            known = () if user is None else policy.contexts.of_user(user, "Why?")
            contexts = [known if read is None else policy.contexts.read_text(read)]
        index = 0 if user is None or policy.users is None else policy.users.index(user)
        return generate(policy, ["Why?"], [index], user_texts=[before], contexts=contexts, options=options)[0]

    own = "I sail." if setting == "prompt" else ""
    model = prlhf.load(tmp_path / "run")
    sampling: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0}
    assert model.policy.user_texts == ({"ann": own} if own else {})
    for user, before in (("ann", own), ("bob", ""), (None, "")):
        assert model.answer("Why?", user, **sampling) == expected(user, before)
    given = expected("ann", *(("", "I knit.") if kind == "text" else ("I knit.",)))
    assert model.answer("Why?", "ann", user_text="I knit.", **sampling) == given
    (tmp_path / "prompts.txt").write_text("Why?\n")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out.jsonl"), "--temperature", "0"]
    assert main(["generate", str(tmp_path / "run"), "--users", "all", "--max-new-tokens", "8", *arguments]) == 0
    answers = [json.loads(answer)["response"] for answer in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == [expected("ann", own), expected("bob", "")]
    if own:
        assert expected("ann", own) != expected("ann", "")
