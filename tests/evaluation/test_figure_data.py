"""What the figures draw, from runs made by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from prlhf.evaluation.figure_data import (
    accuracy_by_user,
    accuracy_over_steps,
    answers_side_by_side,
    running_mean,
    training_curve,
    wilson_interval,
    words_by_user,
    words_of_all,
    worst_users,
)
from prlhf.evaluation.run_files import RunFiles, read_runs
from tests.evaluation.runs import finished_run, write_run


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    (run,) = read_runs([finished_run(tmp_path / "mine")])
    return run


def test_the_interval_of_a_share_solves_wilsons_equation() -> None:
    """Its bounds are where (share - bound)^2 = z^2 bound (1 - bound) / n."""
    for share, count in ((0.5, 10), (0.93, 200), (0.1, 30)):
        for bound in wilson_interval(share, count):
            assert (share - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / count, rel=1e-9)
    low, high = wilson_interval(1.0, 20)
    assert (low, high) == (pytest.approx(20 / (20 + 1.96**2)), 1.0)
    assert wilson_interval(0.0, 20) == (0.0, pytest.approx(1 - low))


def test_every_share_lies_inside_its_interval() -> None:
    for count in range(1, 200, 7):
        for correct in range(count + 1):
            low, high = wilson_interval(correct / count, count)
            assert 0 <= low <= correct / count <= high <= 1


def test_users_come_in_the_order_of_the_evaluation(run: RunFiles) -> None:
    own, generic = accuracy_by_user(run), accuracy_by_user(run, generic=True, label="generic")
    assert (own.label, generic.label) == ("mine", "generic")
    assert {user: (e.value, e.size) for user, e in own.by_user.items()} == {"ann": (1.0, 4), "bob": (0.25, 4)}
    assert [estimate.value for estimate in generic.by_user.values()] == [0.5, 0.75]
    assert (own.by_user["bob"].low, own.by_user["bob"].high) == wilson_interval(0.25, 4)


def test_the_worst_users_come_first(run: RunFiles) -> None:
    assert [(user, own.value, generic.value) for user, own, generic in worst_users(run, 5)] == [
        ("bob", 0.25, 0.75), ("ann", 1.0, 0.5)
    ]
    assert [user for user, *_ in worst_users(run, 1)] == ["bob"]


def test_words_are_means_with_students_interval(run: RunFiles) -> None:
    """ann: 1 and 2 words; bob: 3 and 5. t of one degree of freedom is 12.706; fewer than no words do not exist."""
    words = words_by_user(run.samples["policy"], "policy").by_user
    assert (words["ann"].value, words["bob"].value) == (1.5, 4.0)
    assert (words["ann"].low, words["ann"].high) == (0.0, pytest.approx(1.5 + 12.706 * 0.5))
    assert words["bob"].high == pytest.approx(4 + 12.706 * math.sqrt(2) / math.sqrt(2))
    single = words_by_user(run.samples["reference"], "reference").by_user["ann"]
    assert single == (2.0, 2.0, 2.0, 1), "one answer has no interval"
    level = words_of_all(run.samples["policy"], "all", series=0)
    assert (level.label, level.estimate.value, level.estimate.size, level.series) == ("all", 11 / 4, 4, 0)


def test_a_training_curve_leaves_out_what_was_not_finite(run: RunFiles) -> None:
    curve = training_curve(run, "loss", smooth=False)
    assert curve is not None
    assert (curve.label, list(curve.steps), list(curve.values)) == ("mine", [1, 3], [1.0, pytest.approx(1 / 3)])
    assert training_curve(run, "nll/chosen") is None
    unnamed = training_curve(run, "loss", label="")
    assert unnamed is not None and unnamed.label == ""


def test_a_running_mean_is_centred_and_shorter_at_the_ends() -> None:
    assert running_mean([1.0, 2.0, 6.0, 3.0], 3) == [1.5, 3.0, pytest.approx(11 / 3), 4.5]
    assert running_mean([1.0, 5.0], 1) == [1.0, 5.0]


def test_a_long_curve_is_averaged_over_a_fortieth(run: RunFiles) -> None:
    metrics = [{"step": i, "loss": float(i % 2)} for i in range(400)]
    curve = training_curve(dataclasses.replace(run, metrics=metrics), "loss")
    assert curve is not None and len(curve.values) == 400
    assert all(0.4 < value < 0.6 for value in curve.values)


def test_accuracy_over_steps_has_its_intervals(run: RunFiles) -> None:
    curve = accuracy_over_steps(run, "seen", label="own")
    assert curve is not None
    assert (curve.label, curve.steps, curve.values) == ("own", [20, 100], [0.25, 0.5])
    assert curve.bounds == [(0.15, 0.35), (0.4, 0.6)]
    assert accuracy_over_steps(run, "generic") is None


def test_answers_stand_side_by_side_with_the_references_first(run: RunFiles) -> None:
    assert answers_side_by_side(run, num_prompts=2, num_users=9) == [
        ("Q0", [("the reference", "so so"), ("ann", "one"), ("bob", "one two three")]),
        ("Q1", [("ann", "one two"), ("bob", "one two three four five")]),
    ]
    ((_, answers),) = answers_side_by_side(run, num_prompts=1, num_users=1)
    assert answers == [("the reference", "so so"), ("ann", "one")]


def test_a_dialogue_is_shown_turn_by_turn(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "mine", samples=False)])
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    samples = {"policy": [{"user_id": "ann", "prompt": turns, "response": "Bye"}]}
    assert answers_side_by_side(dataclasses.replace(run, samples=samples), num_prompts=1, num_users=1) == [
        ("user: Hi\nassistant: Yes?", [("ann", "Bye")])
    ]
