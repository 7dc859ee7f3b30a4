"""Encoders in a run: users never seen are served from what they say or judged, and no row reads its own answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prlhf.cli import main
from prlhf.data import tokenize
from prlhf.data.collate import collate_pairs
from prlhf.data.context import collate_contexts, collect_facts
from prlhf.data.prepared import load_prepared
from prlhf.data.records import PreferenceRow
from prlhf.engine import build, final
from prlhf.engine.build import Job, build_job, load_job_data
from prlhf.engine.checkpoint import Progress
from prlhf.engine.evaluate import evaluate_checkpoint
from prlhf.engine.score import score_file
from prlhf.engine.trainer import batches_of_step, contexts_of, save_job, train
from prlhf.errors import DataError
from prlhf.evaluation.report import format_figures
from prlhf.generation import SamplingOptions, generate
from prlhf.models import load_policy, load_reward_model
from tests.tiny_run import Tiny, perturbed_job, write_jsonl
from tests.user_world import NUM_UNSEEN, write_user_world

KINDS = ["text", "history"]
LEARN: dict[str, Any] = {"checkpoint__every_steps": 0, "train__encoder_lr": 1e-2}


@pytest.fixture(scope="module")
def world(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny model, and users who say what they like."""
    return Tiny(tiny.model, write_user_world(tmp_path_factory.mktemp("world") / "data"))


@pytest.fixture
def bare_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user text stays out of the prompt, where the generic user would read it too."""

    def without_text(rows: list[PreferenceRow], *args: Any, **options: Any) -> Any:
        return tokenize.tokenize_pairs([dataclasses.replace(row, user_text="") for row in rows], *args, **options)

    for module in (build, final):
        monkeypatch.setattr(module, "tokenize_pairs", without_text)


def serve_the_unseen(world: Tiny, run_dir: Path, **settings: Any) -> dict[str, Any]:
    figures = train(world.config(**settings, **LEARN), run_dir)
    accuracy = figures["accuracy"]
    assert accuracy["unseen_generic"]["mean"] == pytest.approx(0.5, abs=0.1), "opposed tastes, and the text is hidden"
    assert accuracy["unseen"]["mean"] >= 0.8
    assert accuracy["unseen"]["num_users"] == len(figures["per_unseen_user"]) == NUM_UNSEEN
    return figures


@pytest.mark.parametrize(("kind", "steps"), [("text", 30), ("history", 20)])
def test_prm_serves_users_it_never_saw(
    world: Tiny, bare_prompts: None, tmp_path: Path, kind: str, steps: int
) -> None:
    settings = {"method": "prm", "user__kind": kind, "train__max_steps": steps, "train__batch_rows": 8}
    figures = serve_the_unseen(world, tmp_path / "run", **settings)
    shuffled = figures["leaks"]["shuffled_users"]
    assert shuffled["expected"] == {"mean": pytest.approx(0.5, abs=0.05), "known": pytest.approx(1.0, abs=0.05)}
    assert shuffled["mean"] == pytest.approx(shuffled["expected"]["mean"], abs=0.1), "what it reads decides"
    assert figures["accuracy"]["seen"]["mean"] >= 0.8
    table = format_figures(figures)
    assert "users drawn anew (expected" in table
    assert f"unseen users, own {kind}" in table and "unseen users, generic user" in table
    again = evaluate_checkpoint(tmp_path / "run", source=None, overrides=[])
    assert again["accuracy"] == figures["accuracy"], "the checkpoint and the data give the run's own figures"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lora", "lr"), [({"rank": 2, "alpha": 4}, 1e-2), (None, 3e-3)], ids=["lora", "full"])
def test_pdpo_serves_users_it_never_saw(
    world: Tiny, bare_prompts: None, tmp_path: Path, kind: str, lora: dict[str, int] | None, lr: float
) -> None:
    settings = {"user__kind": kind, "train__max_steps": 60, "train__batch_rows": 16, "model__lora": lora}
    accuracy = serve_the_unseen(world, tmp_path / "run", train__lr=lr, **settings)["accuracy"]
    assert accuracy["unseen"]["mean"] > accuracy["unseen_generic"]["mean"]


def saved(job: Job, run_dir: Path) -> Path:
    save_job(job, Progress(step=1), run_dir)
    return run_dir


def logps_with(job: Job, rows: list[PreferenceRow], place: int) -> torch.Tensor:
    """Log-probs of training row `place`'s two responses, always as the data set first had them, at three steps."""
    assert job.contexts is not None
    contexts = job.contexts.with_facts(collect_facts(rows))
    batch = collate_pairs([job.rows[place]], job.pad_id)
    values = []
    for step in range(3):
        read = collate_contexts([contexts.of_row(rows[place], (1, step, place), training=True)], job.pad_id)
        values += job.model.logps(batch, batch.user_ids, read)[:2]
    return torch.stack(values)


def test_a_row_s_own_label_changes_no_logit_and_another_row_s_does(world: Tiny) -> None:
    job = perturbed_job(world.config(user__kind="history"))
    rows = load_prepared(world.data).train

    def flipped(place: int) -> list[PreferenceRow]:
        row = rows[place]
        return [*rows[:place], dataclasses.replace(row, chosen=row.rejected, rejected=row.chosen), *rows[place + 1 :]]

    assert rows[3].user_id == rows[4].user_id
    expected = logps_with(job, rows, 3)
    assert torch.equal(logps_with(job, flipped(3), 3), expected)
    assert not torch.equal(logps_with(job, flipped(4), 3), expected)


def test_batches_carry_other_pairs_of_the_row_s_user_drawn_anew_at_each_step(world: Tiny) -> None:
    job = build_job(world.config(user__kind="history", train__batch_rows=8))
    again = build_job(world.config(user__kind="history", train__batch_rows=8, train__microbatch_tokens=200))
    counts = []
    for step in range(4):
        (whole,), _ = batches_of_step(job, step)
        cut, _ = batches_of_step(again, step)
        assert len(cut) > 1
        pairs = (whole.context.lengths > 0).sum(dim=1) // 2
        apart = {
            int(row): int(number)
            for batch in cut
            for row, number in zip(batch.rows, (batch.context.lengths > 0).sum(dim=1) // 2, strict=True)
        }
        assert apart == dict(zip(whole.rows.tolist(), pairs.tolist(), strict=True))
        counts += pairs.tolist()
    assert set(counts) >= {0, 1, 7} and max(counts) <= 7, "of eight pairs a user the row's own is left out"


def test_user_models_that_are_tables_have_batches_without_a_context(tiny: Tiny) -> None:
    job = build_job(tiny.config())
    assert all(batch.context is None for batch in batches_of_step(job, 0)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_answers_known_and_unknown_users(world: Tiny, tmp_path: Path, kind: str) -> None:
    """It holds what it needs of the known ones; the data may be gone."""
    job = perturbed_job(world.config(user__kind=kind))
    saved(job, tmp_path / "run")
    policy = load_policy(tmp_path / "run")
    assert policy.contexts is not None and job.model.contexts is not None
    assert policy.contexts.facts == job.model.contexts.facts
    unknown = (
        policy.contexts.read_text("Please be brief.")
        if kind == "text"
        else policy.contexts.read_pairs(load_prepared(world.data).eval_unseen[:3])
    )
    contexts = [policy.contexts.of_user("s0", "Why?"), policy.contexts.of_user("s1", "Why?"), unknown, ()]
    options = SamplingOptions(max_new_tokens=8, temperature=0.0)

    def answers(model: Any, users: list[int], read: Any) -> list[str]:
        return generate(model, ["Why?"] * 4, users, contexts=read, options=options)

    expected = answers(job.model, [1, 2, 0, 0], contexts)
    assert answers(policy, [1, 2, 0, 0], contexts) == expected
    assert answers(policy, [0, 0, 0, 0], None) == [expected[3]] * 4
    assert len(set(expected)) > 1


def test_generate_reads_what_an_unknown_user_says(world: Tiny, tmp_path: Path) -> None:
    saved(perturbed_job(world.config(user__kind="text")), tmp_path / "run")
    (tmp_path / "prompts.txt").write_text("Why?\nHow?\n", encoding="utf-8")
    arguments = ["generate", str(tmp_path / "run"), "--prompts", str(tmp_path / "prompts.txt"), "--temperature", "0"]
    arguments += ["--users", "generic", "--max-new-tokens", "8"]

    def answers(*about: str) -> list[str]:
        out = tmp_path / "answers.jsonl"
        assert main([*arguments, "--out", str(out), *about]) == 0
        return [json.loads(line)["response"] for line in out.read_text().splitlines()]

    policy = load_policy(tmp_path / "run")
    assert policy.contexts is not None
    read = [policy.contexts.read_text("Please be brief.")] * 2
    options = SamplingOptions(max_new_tokens=8, temperature=0.0)
    told = answers("--user-text", "Please be brief.")
    assert told == generate(policy, ["Why?", "How?"], [0, 0], contexts=read, options=options)
    assert told != answers()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_user_s_own_context(world: Tiny, tmp_path: Path, kind: str) -> None:
    """Behind the user's own text, which training had in front of the prompt."""
    job = perturbed_job(world.config(user__kind=kind, method="prm"))
    saved(job, tmp_path / "run")
    model = load_reward_model(tmp_path / "run")
    file = write_jsonl(tmp_path / "f.jsonl", [{"prompt": "Tell me about tea", "chosen": "It is.", "rejected": "No."}])
    records = score_file(tmp_path / "run", file, ["s0", "s1", "generic"])
    assert model.contexts is not None and job.preferences is not None
    texts = job.preferences.user_texts()
    for record in records:
        user = record["user_id"]
        known = user != "generic"
        tokenized = tokenize.tokenize_pairs(
            [PreferenceRow("p", user, "Tell me about tea", "It is.", "No.", texts[user] if known else "")],
            model.tokenizer, model.users if known else None, max_tokens=200, max_prompt_tokens=64, num_user_tokens=3,
        )
        context = model.contexts.of_user(user, "Tell me about tea", ("It is.", "No.")) if known else ()
        batch = collate_pairs(tokenized.rows, job.pad_id, [context])
        scores = model.scores(batch, batch.user_ids, batch.context)
        assert record["chosen"] == pytest.approx(scores.chosen.item(), abs=1e-5)
        assert record["rejected"] == pytest.approx(scores.rejected.item(), abs=1e-5)
    assert len({record["chosen"] for record in records}) == 3


def test_the_command_line_answers_from_a_checkpoint(world: Tiny, tmp_path: Path) -> None:
    saved(perturbed_job(world.config(user__kind="text")), tmp_path / "run")
    (tmp_path / "prompts.txt").write_text("Tell me about tea\n")
    out = tmp_path / "out.jsonl"
    arguments = ["--users", "s0,generic", "--out", str(out), "--max-new-tokens", "3", "--temperature", "0"]
    assert main(["generate", str(tmp_path / "run"), "--prompts", str(tmp_path / "prompts.txt"), *arguments]) == 0
    assert [json.loads(line)["user_id"] for line in out.read_text().splitlines()] == ["s0", "generic"]


def test_data_with_nothing_to_read_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="user.kind text reads user_text, and no training row has one"):
        build_job(tiny.config(user__kind="text"))
    row = {"prompt": "Why?", "chosen": "a", "rejected": "b"}
    path = write_jsonl(tmp_path / "train.jsonl", [{**row, "user_id": user} for user in ("ann", "bob")])
    with pytest.raises(DataError, match="no user has two training rows"):
        build_job(tiny.config(user__kind="history", data__source=str(path.parent)))


def thumbs_file(path: Path, *, with_pairs: bool) -> Path:
    """Each user's verdicts on three answers a prompt that they like and three that they do not, or on one of them."""
    records = [
        {"user_id": user, "prompt": f"Tell me about {thing}", "response": f"{kind} {number} {thing}", "label": label}
        for user in ("ann", "bob", "cat")
        for place, thing in enumerate(["tea", "rain", "chess", "bread"])
        for kind, label in (("good", True), ("bad", False))
        for number in range(3)
        if with_pairs or (label == (place % 2 == 0) and number == 0)
    ]
    return write_jsonl(path, [{**record, "user_text": f"I am {record['user_id']}."} for record in records])


@pytest.mark.parametrize("with_pairs", [True, False])
def test_unpaired_rows_are_read_with_their_own_user_s_text(tiny: Tiny, tmp_path: Path, with_pairs: bool) -> None:
    source = str(thumbs_file(tmp_path / "thumbs.jsonl", with_pairs=with_pairs))
    settings = {"user__kind": "text", "loss__kind": "kto", "data__user_text": "none", "data__source": source}
    config = tiny.config(**settings, data__eval_prompts=0.0)
    job, rows = build_job(config), load_job_data(config).labelled
    assert job.contexts is not None and rows
    read = contexts_of(job, range(len(job.rows)), 0)
    assert read == [job.contexts.read_text(f"I am {rows[row.row].user_id}.") for row in job.rows]
    assert job.model.contexts.facts["bob"].text == "I am bob."


def test_unpaired_rows_are_read_with_their_own_user_s_pairs_about_other_prompts(tiny: Tiny, tmp_path: Path) -> None:
    source = str(thumbs_file(tmp_path / "thumbs.jsonl", with_pairs=True))
    settings = {"user__kind": "history", "loss__kind": "kto", "data__source": source, "data__eval_prompts": 0.0}
    config = tiny.config(**settings)
    job, rows = build_job(config), load_job_data(config).labelled
    assert job.contexts is not None and rows
    for step in range(3):
        for context, row in zip(contexts_of(job, range(len(job.rows)), step), job.rows, strict=True):
            own = job.contexts.facts[rows[row.row].user_id].pairs
            allowed = [job.contexts.read_pairs([pair]) for pair in own if pair.prompt != rows[row.row].prompt]
            assert all(context[i : i + 2] in allowed for i in range(0, len(context), 2))
    assert len(train(config, tmp_path / "run")["per_user"]) == 0, "no prompt is held out"


def test_rows_of_a_file_without_texts_are_read_with_those_that_the_checkpoint_keeps(
    world: Tiny, tmp_path: Path
) -> None:
    config = world.config(method="prm", user__kind="text", train__max_steps=2)
    expected = train(config, tmp_path / "run")["accuracy"]["seen"]
    bare = [json.loads(line) for line in (world.data / "eval_seen.jsonl").read_text().splitlines()]
    assert not any("user_text" in record for record in bare), "users.json has them"
    path = write_jsonl(tmp_path / "bare.jsonl", bare)
    read = evaluate_checkpoint(tmp_path / "run", source=str(path), overrides=[])["accuracy"]["seen"]
    assert read == expected
    other = write_jsonl(tmp_path / "other.jsonl", [{**record, "user_text": "I want it all."} for record in bare])
    assert evaluate_checkpoint(tmp_path / "run", source=str(other), overrides=[])["accuracy"]["seen"] != expected
