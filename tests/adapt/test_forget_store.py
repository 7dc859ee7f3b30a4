"""Checkpoints that keep their users in a store: forgetting and adding users changes one checkpoint and no other."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prlhf.adapt.add_users import write_with_users
from prlhf.adapt.forget import forget_user
from prlhf.engine.trainer import train
from prlhf.errors import CheckpointError, DataError
from prlhf.files import find_damage
from prlhf.models import load_policy, user_rows
from prlhf.usermodel import row_table
from prlhf.usermodel.store import UserStore
from tests.cli_run import Run
from tests.forget_run import bytes_of, contents, killed_at, logits_of
from tests.tiny_run import (
    EVAL_THINGS,
    THINGS,
    Crash,
    Tiny,
    at_step,
    crash,
    preference_record,
    snapshot,
    write_jsonl,
)

CANARY = secrets.token_hex(16)
USERS = ["ann", CANARY, "bob", *(f"u{i}" for i in range(9))]  # the nine have a row each, and some are never trained
ROW_BYTES = 4 * 3 * 32
FIELDS = ("row", "exp_avg", "exp_avg_sq")
STEPS = ["step-00000002", "step-00000003", "step-00000004"]


@pytest.fixture(autouse=True, scope="module")
def small_stores() -> Iterator[None]:
    """Every table of users is large and goes into a store, two records a shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_table, "LARGE_TABLE_BYTES", 0)
        patch.setattr(user_rows, "STORE_FROM_BYTES", 0)
        patch.setattr(UserStore, "create", partial(UserStore.create, shard_bytes=2 * (4 + 3 * ROW_BYTES + 16)))
        yield


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three checkpoints, which share shards, and its data."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny.data, root / "data")
    rows = [preference_record(thing, user, prefers_short=True) for thing in THINGS[:4] for user in USERS[:3]]
    rows += [preference_record(thing, user, prefers_short=True) for thing, user in zip(THINGS, USERS[3:], strict=True)]
    write_jsonl(root / "data" / "train.jsonl", rows)
    train(_config(tiny, root), root / "run")
    return root


def _config(tiny: Tiny, root: Path) -> object:
    return tiny.config(
        data__source=str(root / "data"), eval__generate=0, eval__few_shot=0,
        checkpoint__every_steps=1, checkpoint__keep_last=3,
    )


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return _copy(whole, tmp_path / "root")


def _copy(source: Path, target: Path) -> Path:
    """With its hard links, and none to the source."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)
    return target


def _checkpoints(root: Path) -> list[Path]:
    found = sorted((root / "run" / "checkpoints").iterdir())
    assert [path.name for path in found] == STEPS
    return found


def _rows(checkpoint: Path, *, but: str = "") -> dict[str, Tensor]:
    """What the store holds of every user but one, as bits."""
    with UserStore.open(checkpoint / "users") as store:
        users = [user for user in store if user != but]
        assert store.find_damage() == []
        return {f"{user} {field}": store.read([user], field) for user in users for field in (*FIELDS, "step")}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _needles(root: Path) -> list[bytes]:
    """The id, and the row and moments of every kept checkpoint; a newer store holds older versions, too."""
    rows = [_rows(checkpoint)[f"{CANARY} {field}"] for checkpoint in _checkpoints(root) for field in FIELDS]
    return [CANARY.encode(), *{row.numpy().tobytes() for row in rows}]


def _shared(root: Path) -> set[str]:
    """Full shards that are one file in all checkpoints."""
    first, *others = _checkpoints(root)
    names = {path.name for path in (first / "users").glob("rows-*.bin")}
    return {
        name for name in names
        if all((other / "users" / name).is_file() and (other / "users" / name).samefile(first / "users" / name)
               for other in others)
    }


def test_nothing_of_the_user_is_in_any_store_and_the_others_stay_bitwise(root: Path) -> None:
    needles, shared = _needles(root), _shared(root)
    assert len(needles) > 4 and all(needle in bytes_of(root / "run") for needle in needles)
    others = [_rows(checkpoint, but=CANARY) for checkpoint in _checkpoints(root)]
    before = load_policy(root / "run")
    receipt = forget_user(root / "run", CANARY, data=root / "data")
    assert [needle for needle in needles if needle in bytes_of(root)] == []
    for checkpoint, rows in zip(_checkpoints(root), others, strict=True):
        assert _same(_rows(checkpoint), rows)
        assert find_damage(checkpoint) == []
        sealed = json.loads((checkpoint / "manifest.json").read_text())["files"]
        assert sealed.keys() == contents(checkpoint).keys() - {"manifest.json"}
    assert len(shared) == len(_shared(root)) > 0 and shared != _shared(root), "what they shared they share again"
    after = load_policy(root / "run")
    for user in (None, *(user for user in USERS if user != CANARY)):
        assert torch.equal(logits_of(after, user), logits_of(before, user))
    with pytest.raises(DataError, match="is not one of the 11 known users"):
        after.users.index(CANARY)  # type: ignore[union-attr]
    assert "step-00000004: the user's part of users.json, users/" in receipt["removed"]


@pytest.mark.parametrize("stride", [29, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_at_any_moment_every_checkpoint_is_whole_and_a_second_call_finishes(
    stride: int, root: Path, tmp_path: Path
) -> None:
    work = _copy(root, tmp_path / "work")
    with killed_at(10**6) as count:
        forget_user(work / "run", CANARY)
    expected, num_points = contents(work), count[0]
    assert num_points > 100
    for point in range(0, num_points, stride):
        shutil.rmtree(work)
        _copy(root, work)
        with pytest.raises(Crash), killed_at(point):
            forget_user(work / "run", CANARY)
        for checkpoint in (work / "run" / "checkpoints").glob("step-*"):
            assert find_damage(checkpoint) == [], point
        with killed_at(10**6):
            forget_user(work / "run", CANARY)
        assert contents(work) == expected, point


def test_a_user_who_was_never_trained_leaves_the_shards_as_they_are(root: Path) -> None:
    stores = [set(_rows(checkpoint)) for checkpoint in _checkpoints(root)]
    user = next(user for user in USERS if not any(f"{user} row" in rows for rows in stores))
    before, shared = [_rows(checkpoint) for checkpoint in _checkpoints(root)], _shared(root)
    forget_user(root / "run", user)
    assert all(_same(_rows(checkpoint), rows) for checkpoint, rows in zip(_checkpoints(root), before, strict=True))
    assert _shared(root) == shared
    assert user not in load_policy(root / "run").users  # type: ignore[operator]
    for checkpoint in _checkpoints(root):
        with UserStore.open(checkpoint / "users") as store:
            assert store.is_forgotten(user)


def test_a_damaged_store_is_refused_before_anything_goes(root: Path) -> None:
    """In a shard, which only its hash tells, and at the end of the tail, which opening the store tells."""
    for name in ("rows-000000-*.bin", "index.sqlite"):
        copy = _copy(root, root.with_name(name[:4]))
        [path] = _checkpoints(copy)[0].glob(f"users/{name}")
        path.write_bytes(path.read_bytes()[:-1] + b"?" if path.suffix == ".bin" else b"not an index")
        with pytest.raises(CheckpointError, match="; delete the checkpoint, which cannot be used"):
            forget_user(copy / "run", CANARY)
        assert not (copy / "run" / "tombstones.json").exists()


@pytest.mark.parametrize("falls_below", [False, True])
def test_training_goes_on_without_the_user(
    falls_below: bool, whole: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the table, a user smaller, would no longer get a store."""
    monkeypatch.setattr(user_rows, "STORE_FROM_BYTES", len(USERS) * ROW_BYTES if falls_below else 0)
    shutil.copytree(whole / "data", tmp_path / "data")
    config = _config(tiny, tmp_path)
    with pytest.raises(Crash), at_step(3, crash):
        train(config, tmp_path / "run")
    cut = tmp_path / "run" / "checkpoints" / "step-00000003"
    rows = _rows(cut, but=CANARY)
    forget_user(tmp_path / "run", CANARY, data=tmp_path / "data")
    offsets = load_policy(cut).user_encoder.offsets  # type: ignore[union-attr]
    for index, user in enumerate(user for user in USERS if user != CANARY):
        assert torch.equal(offsets[index], rows[f"{user} row"][0] if f"{user} row" in rows else torch.zeros(3, 32))
    assert train(config, tmp_path / "run")["step"] == 4
    last = cut.with_name("step-00000004")
    assert (last / "users").is_dir() == ("offsets" not in load_file(last / "users.safetensors")) == (not falls_below)
    moments = load_file(last / "optimizer.safetensors")
    steps = moments["user_encoder.offsets.step"].sum() if falls_below else sum(
        value for name, value in _rows(last).items() if name.endswith(" step")
    )
    assert steps > sum(value for name, value in rows.items() if name.endswith(" step"))


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tiny, tmp_path, capsys)


def test_users_are_added_to_the_store_and_leave_it_without_a_trace(root: Path, run: Run) -> None:
    before, base = snapshot(root), load_policy(root / "run")
    newest, out = _checkpoints(root)[-1], run.folder / "out"
    # Not from feedback: who is like somebody known gets the very row.
    write_with_users(newest, out, base, {name: torch.randn(3, 32) for name in ("dora", "eve")}, {})
    feedback = write_jsonl(run.folder / "fay.jsonl", [preference_record(EVAL_THINGS[0], "fay", prefers_short=True)])
    assert run("adapt", out, "--feedback", feedback, "--out", run.folder / "more")[0] == 0
    assert snapshot(root) == before
    rows, old = _rows(run.folder / "more"), _rows(newest)
    assert {name.split()[0] for name in rows.keys() - old.keys()} == {"dora", "eve", "fay"}
    assert _same({name: rows[name] for name in old}, old)
    full = [path.name for path in (newest / "users").glob("rows-*.bin")]
    assert full and all((newest / "users" / name).samefile(out / "users" / name) for name in full)
    adapted = load_policy(run.folder / "more")
    assert adapted.users.user_ids == (*USERS, "dora", "eve", "fay")  # type: ignore[union-attr]
    assert not torch.equal(logits_of(adapted, "dora"), logits_of(base, None))
    assert not torch.equal(logits_of(adapted, "fay"), logits_of(base, None))
    row = rows["dora row"].numpy().tobytes()
    assert row in bytes_of(run.folder / "more")
    forget_user(run.folder / "more", "dora")
    assert not any(needle in bytes_of(run.folder / "more") for needle in (row, b"dora"))
    after = load_policy(run.folder / "more")
    for user in (None, *USERS):
        assert torch.equal(logits_of(after, user), logits_of(base, user))
    assert find_damage(out) == [] and "dora" in load_policy(out).users  # type: ignore[operator]
    [line] = run.refused("adapt", run.folder / "more", "--user", "dora", "--out", run.folder / "again")
    assert line.startswith("user 'dora': was forgotten") and not (run.folder / "again").exists()


def test_forgetting_in_the_run_leaves_models_adapted_from_it_as_they_are(root: Path, run: Run) -> None:
    out = run.folder / "out"
    assert run("adapt", root / "run", "--user", "fay", "--out", out)[0] == 0
    before = snapshot(out)
    forget_user(root / "run", CANARY)
    assert snapshot(out) == before and find_damage(out) == []


def test_the_receipt_counts_who_else_has_the_users_row(root: Path) -> None:
    checkpoint, adapted = _checkpoints(root)[-1], root / "adapted"
    row = _rows(checkpoint)[f"{CANARY} row"][0]
    states = {"fay": row, "gus": row, "dan": torch.zeros_like(row), "eve": torch.zeros_like(row)}
    write_with_users(checkpoint, adapted, load_policy(checkpoint), states, {})
    [line] = [line for line in forget_user(adapted, CANARY)["remains"] if "very row" in line]
    assert "2 other users have it" in line
    assert not any("very row" in line for line in forget_user(adapted, "dan")["remains"])
