"""The benchmark of new users draws judgments and measures on different rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.adapt import leave_out, pick_subjects, read_users
from prlhf.data.load import load_preference_data
from prlhf.data.records import PreferenceRow
from prlhf.data.tokenize import tokenize_pairs
from prlhf.engine.build import tokenize_limits
from prlhf.evaluation.accuracy import score_pairs
from tests.tiny_run import Tiny, perturbed_job


def test_a_profile_left_out_is_unseen_and_judged_on_held_out_topics(tmp_path: Path) -> None:
    leave_out(7, "P1A", tmp_path / "data")
    options = {"seed": 7, "eval_prompts": 0.1, "unseen_users": 0.0}
    without = load_preference_data(str(tmp_path / "data"), **options)
    assert "P1A" not in {row.user_id for row in (*without.train, *without.dev, *without.eval_seen)}
    assert {row.user_id for row in without.eval_unseen} == {"P1A"}
    [subject] = pick_subjects(load_preference_data("builtin:psoups", **options), ["P1A"], 50)
    assert {row.prompt for row in subject.test} <= {row.prompt for row in without.eval_unseen}
    [unseen] = pick_subjects(without, None, 50)
    for one in (subject, unseen):
        assert len(one.test) == 50
        assert not {row.prompt for row in one.pool} & {row.prompt for row in one.test}


def test_a_reader_of_histories_is_measured_by_what_it_reads(tiny: Tiny) -> None:
    options = {"user__kind": "history", "user__history_pairs": 2}
    job = perturbed_job(tiny.config(**options))
    assert job.preferences is not None
    data = job.preferences
    pairs, test = data.train[:3], data.eval_seen[:4]

    def read(*given: list[PreferenceRow]) -> list[list[float]]:
        return [own.tolist() for own in read_users(job.model, job.config, given, [test] * len(given))]

    none, two, three = read([], pairs[:2], pairs)
    assert two == three, "it learned to read two"
    swapped = [dataclasses.replace(row, chosen=row.rejected, rejected=row.chosen) for row in test]
    [against] = read_users(job.model, job.config, [pairs], [swapped])
    assert against.tolist() == [1 - right for right in two]
    generic = score_pairs(job.model, test, tokenize_pairs(test, job.model.tokenizer, None, **tokenize_limits(
        job.config, job.model)).rows, pad_id=job.pad_id, microbatch_tokens=512)
    assert none == (generic.generic > 0).tolist()
