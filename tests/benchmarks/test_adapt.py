"""The benchmark of new users draws judgments and measures on different rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import adapt_speed
from benchmarks.adapt import Subject, leave_out, measure_curve, measure_questions, pick_subjects, read_users
from benchmarks.adapt_speed import measure_batch
from prlhf.adapt import Judgment
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
    judged = {row.pair_id for row in load_preference_data("builtin:psoups", **options).eval_seen}
    assert {row.pair_id for row in subject.pool} <= judged, "training saw the others"
    [short] = pick_subjects(load_preference_data("builtin:psoups", **options), ["P1A"], 50, enough=10_000)
    assert {row.pair_id for row in short.pool}.isdisjoint(judged)
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


def test_questions_and_curves_are_of_what_adapt_fits_and_have_intervals(tiny: Tiny) -> None:
    job = perturbed_job(tiny.config())
    assert job.preferences is not None
    data = job.preferences
    people = [
        Subject(user, [row for row in data.train if row.user_id == user], [row for row in data.eval_seen if
                                                                           row.user_id == user])
        for user in ("ann", "bob")
    ]
    curves = measure_questions(job.model, job.config, people, 5, 3, 0)
    assert list(curves) == ["chosen", "random"]
    for curve in curves.values():
        assert list(curve) == [0, 1, 2, 3]
        for point in curve.values():
            assert point["accuracy_ci95"][0] <= point["accuracy"] <= point["accuracy_ci95"][1]
    assert curves["chosen"][0] == curves["random"][0]
    [point] = measure_curve(job.model, job.config, people, [2], 2, 0)
    names = ("accuracy", "known_state", "opposite", "leave_one_out", "uncertainty")
    assert all(point[f"{name}_ci95"][0] <= point[name] <= point[f"{name}_ci95"][1] for name in names)


def test_a_batch_is_timed_with_shared_pairs_and_with_everybodys_own(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = perturbed_job(tiny.config())
    assert job.preferences is not None
    fitted: list[list[list[Judgment]]] = []
    monkeypatch.setattr(adapt_speed, "fit_judgments", lambda model, given, **options: fitted.append(given))
    rows = [dataclasses.replace(row, pair_id=f"{row.pair_id} {i}", prompt=f"{i} {row.prompt}")
            for i in range(4) for row in job.preferences.train]
    data = dataclasses.replace(job.preferences, train=rows)
    rates = measure_batch(job.model, job.config, data, ["ann", "bob"], 6, 0)
    of_ann = sum(row.user_id == "ann" for row in rows)
    assert of_ann >= 24 and (rates["shared"][0], rates["own"][0]) == (6, 6)
    shared, own = fitted
    assert [len(user) for user in (*shared, *own)] == [8] * 12
    assert len({judgment for user in own for judgment in user}) == 48
