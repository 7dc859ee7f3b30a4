"""The reader of Personalized Soups, on files written here in the release's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prlhf.data.prepared import load_prepared
from prlhf.data.psoups import PREFERENCE_PROMPTS, prepare_psoups, read_psoups
from prlhf.errors import DataError


def write_release(folder: Path, num_prompts: int = 30) -> Path:
    """Every user judges the same pairs; users B against users A."""
    (folder / "rm_training").mkdir(parents=True)
    for user_id, preference_prompt in PREFERENCE_PROMPTS.items():
        records = []
        for number in range(num_prompts):
            pair = [f"first {number}", f"second {number}"]
            chosen, rejected = pair if user_id.endswith("A") else reversed(pair)
            question = f"Question {number}? {preference_prompt}"
            records.append({"user_input": question, "completion_a": chosen, "completion_b": rejected})
        records.append(records[0])
        records.append({**records[1], "completion_b": records[1]["completion_a"]})
        (folder / "rm_training" / f"{user_id}.json").write_text(json.dumps(records))
    return folder


def test_rows_lose_the_preference_prompt_repetitions_and_identical_responses(tmp_path: Path) -> None:
    rows, dropped = read_psoups(write_release(tmp_path / "raw"))
    assert dropped == {"duplicate": 6, "equal_responses": 6}
    assert list(dict.fromkeys(row.user_id for row in rows)) == ["P1A", "P1B", "P2A", "P2B", "P3A", "P3B"]
    assert {row.prompt for row in rows} == {f"Question {number}?" for number in range(30)}
    assert len(rows) == 6 * 30
    first = {row.user_id: (row.chosen, row.rejected) for row in rows if row.prompt == "Question 0?"}
    assert first["P1A"] == ("first 0", "second 0") and first["P1B"] == ("second 0", "first 0")
    assert len({row.pair_id for row in rows if row.prompt == "Question 0?"}) == 1


def test_preparing_holds_out_the_same_prompts_for_all_six_users(tmp_path: Path) -> None:
    raw = write_release(tmp_path / "raw") / "rm_training"
    summary = prepare_psoups(raw, tmp_path / "out", unseen_users=0.0, eval_prompts=0.1, seed=123)
    data = load_prepared(tmp_path / "out")
    assert data.user_ids() == list(PREFERENCE_PROMPTS)
    assert len(data.eval_seen) == 3 * 6 and len(data.dev) == 1 * 6 and len(data.train) == 26 * 6
    assert summary.num_rows["train"] == 26 * 6 and summary.left_out["duplicate"] == 6
    with pytest.raises(DataError, match="already holds prepared data"):
        prepare_psoups(raw, tmp_path / "out", unseen_users=0.0, eval_prompts=0.1, seed=123)


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no P1A.json, P1B.json"):
        read_psoups(tmp_path)
    raw = write_release(tmp_path / "raw")
    (raw / "rm_training" / "P2B.json").write_text('[{"user_input": "q", "completion": "a", "other": "b"}]')
    with pytest.raises(DataError, match=r"P2B.json:1: completion_a is None, .*did you mean 'completion'"):
        read_psoups(raw)
