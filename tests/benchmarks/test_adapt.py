"""The benchmark of new users draws judgments and measures on different rows."""

from __future__ import annotations

from pathlib import Path

from benchmarks.adapt import leave_out, pick_subjects
from prlhf.data.load import load_preference_data


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
