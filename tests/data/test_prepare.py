"""The arguments of `prlhf data prepare`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from prlhf.data.load import BUILTIN_PREFERENCES, load_preference_data
from prlhf.data.prepare import add_prepare_arguments, run_prepare
from prlhf.data.prepared import load_prepared
from prlhf.data.splits import MAX_SEED
from prlhf.errors import DataError
from tests.data.test_tldr import NAMES, write_release
from tests.tiny_run import snapshot


def prepare(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_prepare_arguments(parser)
    return run_prepare(parser.parse_args(arguments))


@pytest.fixture
def raw(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    records = [{"question": f"q{n}", "a": "x", "b": "y", "by": f"w{n % 4}"} for n in range(80)]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_the_command_prepares_a_file_and_says_what_it_wrote(
    raw: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    columns = ("--map", "user_id=by", "prompt=question", "--map", "chosen=a", "rejected=b")
    shares = ("--unseen-users", "0.25", "--eval-prompts", "0.5", "--seed", "7")
    assert prepare("jsonl", "--raw", raw, "--out", str(out), *columns, *shares) == 0
    data = load_prepared(out)
    assert len(data.user_ids()) == 3 and len(data.eval_seen) + len(data.eval_unseen) == 40
    left_out = 80 - sum(len(rows) for rows in (data.train, data.dev, data.eval_seen, data.eval_unseen))
    printed = capsys.readouterr().out
    assert f"train {len(data.train)}, dev {len(data.dev)}" in printed
    assert f"unseen_user_on_training_prompt {left_out}\n" in printed


def test_what_is_prepared_may_not_lie_where_it_is_written(raw: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    columns = ("--map", "user_id=by", "prompt=question", "chosen=a", "rejected=b")
    assert prepare("jsonl", "--raw", raw, "--out", str(out), *columns) == 0
    before = snapshot(out)
    (tmp_path / "link").symlink_to(out)
    for source in (out / "train.jsonl", tmp_path / "link" / "train.jsonl"):
        with pytest.raises(DataError, match="train.jsonl: lies in --out .*; choose another --out"):
            prepare("jsonl", "--raw", str(source), "--out", str(out), "--force")
    for kind in ("psoups", "tldr", "prism", "convarg"):
        with pytest.raises(DataError, match="lies in --out"):
            prepare(kind, "--raw", str(out), "--out", str(out), "--force")
    assert snapshot(out) == before


def test_the_builtin_world_can_be_written_as_a_prepared_directory(tmp_path: Path) -> None:
    assert prepare("builtin:psoups", "--out", str(tmp_path / "out"), "--seed", "5") == 0
    assert load_prepared(tmp_path / "out").user_ids() == ["P1A", "P1B", "P2A", "P2B", "P3A", "P3B"]


def test_the_comparisons_of_tldr_are_prepared_by_name(tmp_path: Path) -> None:
    raw = write_release(tmp_path / "raw")
    assert prepare("tldr", "--raw", str(raw), "--out", str(tmp_path / "out"), "--max-users", "3") == 0
    assert load_prepared(tmp_path / "out").user_ids() == NAMES[:3]


def test_the_builtin_people_keep_their_texts_in_users_json(tmp_path: Path) -> None:
    assert prepare("builtin:prism", "--out", str(tmp_path / "out"), "--seed", "5") == 0
    data = load_prepared(tmp_path / "out")
    assert data.train == load_preference_data("builtin:prism", seed=5, eval_prompts=0.0, unseen_users=0.0).train
    assert "user_text" not in (tmp_path / "out" / "train.jsonl").read_text()


def test_options_of_another_format_are_refused(raw: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(DataError, match="prepare psoups: --map, --drop, --opposed are for jsonl only"):
        prepare("psoups", "--raw", raw, "--out", out, "--map", "user_id=by")
    with pytest.raises(DataError, match="prepare jsonl: --max-users are for convarg and tldr only"):
        prepare("jsonl", "--raw", raw, "--out", out, "--max-users", "3")
    with pytest.raises(DataError, match="prepare tldr: --min-judgments, --hold-out are for convarg only"):
        prepare("tldr", "--raw", raw, "--out", out, "--hold-out", "debates")
    for format_name in ("tldr", "builtin:tldr"):
        with pytest.raises(DataError, match=f"{format_name}: --unseen-users, --eval-prompts are for jsonl"):
            prepare(format_name, "--out", out, "--unseen-users", "0.5")
    with pytest.raises(DataError, match="prepare builtin:tldr: --raw is for data of your own"):
        prepare("builtin:tldr", "--raw", raw, "--out", out)
    with pytest.raises(DataError, match="prepare convarg: no --raw PATH"):
        prepare("convarg", "--out", out)


@pytest.mark.parametrize("seed", ["-1", "4000000001", "5000000000"])
def test_a_seed_that_some_generator_does_not_take_is_refused(raw: str, tmp_path: Path, seed: str) -> None:
    with pytest.raises(DataError, match=f"--seed: got {seed}, expected 0 to 4000000000"):
        prepare("jsonl", "--raw", raw, "--out", str(tmp_path / "out"), "--seed", seed)


@pytest.mark.parametrize("count", ["0", "-1"])
@pytest.mark.parametrize(("name", "option"), [("convarg", "max-users"), ("tldr", "max-users"),
                                              ("convarg", "min-judgments")])
def test_a_count_below_one_is_refused_before_any_work(tmp_path: Path, name: str, option: str, count: str) -> None:
    with pytest.raises(DataError, match=f"^--{option}: got {count}, expected 1 or more$"):
        prepare(name, "--raw", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"), f"--{option}", count)


def test_the_largest_seed_draws_every_builtin_world(tmp_path: Path) -> None:
    for name in BUILTIN_PREFERENCES:
        assert prepare(name, "--out", str(tmp_path / name), "--seed", str(MAX_SEED)) == 0
