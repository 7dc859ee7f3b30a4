"""The reader of UKPConvArg1, on files written here and on the public ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from prlhf.data.convarg import active_users, prepare_convarg, read_convarg
from prlhf.data.prepared import load_prepared
from prlhf.errors import DataError

OPTIONS = {"unseen_users": 0.0, "eval_prompts": 0.2, "seed": 1}


def write_raw(folder: Path, judgments: list[str], num_debates: int = 2) -> Path:
    folder.mkdir()
    arguments = [
        {"arg_id": f"d{debate}/a{number}", "topic": f"d{debate}", "title": f"Title {debate}", "stance": "Yes",
         "text": f"text {debate} {number}"}
        for debate in range(num_debates)
        for number in range(4)
    ]
    (folder / "arguments.jsonl").write_text("\n".join(json.dumps(argument) for argument in arguments))
    (folder / "judgments.csv.gz").write_bytes(gzip.compress("\n".join(["user,arg1,arg2,choice", *judgments]).encode()))
    return folder


def test_a_judgment_becomes_a_row_and_equal_is_dropped(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", ["w,d0/a0,d0/a1,a2", "v,d0/a1,d0/a0,a2", "w,d0/a0,d0/a2,equal"])
    rows, left_out = read_convarg(raw)
    assert [(row.user_id, row.prompt, row.chosen, row.rejected) for row in rows] == [
        ("w", "Debate: Title 0\nStance: Yes", "text 0 1", "text 0 0"),
        ("v", "Debate: Title 0\nStance: Yes", "text 0 0", "text 0 1"),
    ]
    assert rows[0].pair_id == rows[1].pair_id
    assert left_out == {"equal": 1}


def test_workers_are_chosen_by_their_strict_judgments(tmp_path: Path) -> None:
    pairs = [f"d0/a{i},d0/a{j}" for i in range(4) for j in range(i)]
    counts = {"idle": 1, "b": 4, "a": 4, "busy": 6, "undecided": 0}
    judgments = [f"{user},{pair},a1" for user, count in counts.items() for pair in pairs[:count]]
    judgments += [f"undecided,{pair},equal" for pair in pairs]
    rows, _ = read_convarg(write_raw(tmp_path / "raw", judgments))
    assert active_users(rows, min_judgments=4) == {"busy", "a", "b"}
    assert active_users(rows, min_judgments=1, max_users=2) == {"busy", "a"}
    with pytest.raises(DataError, match="no worker has 7 strict judgments"):
        prepare_convarg(tmp_path / "raw", tmp_path / "out", **OPTIONS, min_judgments=7)


@pytest.mark.parametrize("hold_out", ["pairs", "debates"])
def test_what_is_held_out_occurs_in_no_training_row(tmp_path: Path, hold_out: str) -> None:
    judgments = [
        f"w{user},d{debate}/a{i},d{debate}/a{j},a{1 + (user + i + j) % 2}"
        for user in range(5) for debate in range(20) for i in range(4) for j in range(i)
    ]
    raw = write_raw(tmp_path / "raw", judgments, num_debates=20)
    options = {**OPTIONS, "unseen_users": 0.2}
    prepare_convarg(raw, tmp_path / "out", **options, min_judgments=1, hold_out=hold_out)
    data = load_prepared(tmp_path / "out")
    share = {"pairs": 24, "debates": 4}[hold_out]
    held_out = {row.pair_id if hold_out == "pairs" else row.prompt for row in data.eval_seen}
    assert len(held_out) == share
    assert not held_out & {row.pair_id if hold_out == "pairs" else row.prompt for row in data.train + data.dev}
    training_texts = {text for row in data.train for text in (row.chosen, row.rejected)}
    shared = any(row.chosen in training_texts for row in data.eval_seen)
    assert shared == (hold_out == "pairs")
    assert len(data.user_ids()) == 4 and len({row.user_id for row in data.eval_unseen}) == 1


@pytest.mark.parametrize(
    ("judgment", "message"),
    [
        ("w,d0/a0,d0/a9,a1", "judgments.csv.gz:2: arg2 'd0/a9' is not in arguments.jsonl"),
        ("w,d0/a0,d1/a0,a1", "judgments.csv.gz:2: the arguments belong to 'd0' and 'd1'"),
        ("w,d0/a0,d0/a1,both", "judgments.csv.gz:2: choice is 'both'"),
        ("w,d0/a0,d0/a1", "judgments.csv.gz:2: expected 4 fields"),
        ("w,d0/a0,d0/a1,a1,x", "judgments.csv.gz:2: expected 4 fields"),
    ],
)
def test_malformed_judgments_are_named(tmp_path: Path, judgment: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_convarg(write_raw(tmp_path / "raw", [judgment]))
    assert message in str(caught.value)


def test_missing_files_and_other_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="arguments.jsonl: cannot be read"):
        read_convarg(tmp_path)
    raw = write_raw(tmp_path / "raw", ["w,d0/a0,d0/a1,a1"])
    (raw / "judgments.csv.gz").write_bytes(gzip.compress(b"worker,arg1,arg2,choice\nw,d0/a0,d0/a1,a1\n"))
    with pytest.raises(DataError, match="judgments.csv.gz:1: columns .*expected user, arg1, arg2, choice"):
        read_convarg(raw)


def test_the_public_files_have_their_published_numbers(shared_data: Path) -> None:
    """84,445 judgments; 219 workers with at least 40 strict ones."""
    rows, left_out = read_convarg(shared_data / "ukpconvarg1")
    assert len(rows) + sum(left_out.values()) == 84_445
    assert len(active_users(rows, min_judgments=40)) == 219
    assert len({row.prompt for row in rows}) == 32
