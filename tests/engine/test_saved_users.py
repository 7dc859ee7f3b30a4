"""What a checkpoint of many users costs follows the users that moved since the one before."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prlhf
from prlhf.engine.build import Job, build_job
from prlhf.engine.checkpoint import Progress, find_checkpoint, load_checkpoint_
from prlhf.engine.trainer import save_job
from prlhf.errors import CheckpointError, PrlhfError
from prlhf.files import find_damage, seal_directory
from prlhf.models import load_policy, user_rows
from prlhf.usermodel import IndividualUserModel, LowRankUserModel, UserModel, row_table
from prlhf.usermodel.store import UserStore
from tests.engine.cuts import step_of
from tests.engine.two_ranks import state_of
from tests.forget_run import killed_at
from tests.tiny_run import THINGS, Crash, Tiny, preference_record, write_jsonl

USERS = [f"u{i}" for i in range(3 * len(THINGS))]
RECORD_BYTES = 3 * (4 * 3 * 32 + 4) + 4 + 4  # row and moments of 3 x 32 numbers, a count, a checksum each


@pytest.fixture
def job(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """27 users with a row each, in a large table, of whom a step shows four; five records a shard."""
    monkeypatch.setattr(row_table, "LARGE_TABLE_BYTES", 0)
    monkeypatch.setattr(user_rows, "STORE_FROM_BYTES", 0)
    monkeypatch.setattr(UserStore, "create", partial(UserStore.create, shard_bytes=5 * RECORD_BYTES))
    rows = [preference_record(thing, user, prefers_short=True) for thing, user in zip(3 * THINGS, USERS, strict=True)]
    (tmp_path / "data").mkdir()
    for name in ("train", "dev", "eval_seen", "eval_unseen"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows if name == "train" else [])
    return build_job(tiny.config(data__source=str(tmp_path / "data")))


def saved(job: Job, run_dir: Path, step: int) -> Path:
    save_job(job, Progress(step=step, rows_seen=4 * step), run_dir)
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checked_rows(job: Job, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of users each later check for finite numbers reads."""
    counts: list[int] = []
    isfinite = torch.isfinite

    def counting(values: Tensor) -> Tensor:
        if values.dim() == 3 and values.shape[1:] == job.model.user_encoder.table.shape[1:]:  # type: ignore[union-attr]
            counts.append(len(values))
        return isfinite(values)

    monkeypatch.setattr(torch, "isfinite", counting)
    return counts


def test_saving_reads_only_users_that_moved_since_the_last_checkpoint(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.model.users is not None and len(job.model.users) == len(USERS)
    counts = checked_rows(job, monkeypatch)
    saved(job, tmp_path, 1)
    assert sum(counts) == 0
    for step in (2, 3):
        counts.clear()
        step_of(job, step, job.optimizer, max_grad_norm=1.0)
        saved(job, tmp_path, step)
        assert 0 < sum(counts) <= 4


def test_a_row_that_is_no_longer_finite_is_not_saved(job: Job, tmp_path: Path) -> None:
    step_of(job, 0, job.optimizer, max_grad_norm=1.0)
    moved = max(job.optimizer.unsaved_rows)
    with torch.no_grad():
        job.model.user_encoder.table[moved, 0, 0] = float("inf")  # type: ignore[union-attr]
    with pytest.raises(PrlhfError, match="train: user_encoder.offsets not finite after step 1"):
        saved(job, tmp_path, 1)


@pytest.mark.parametrize("field", ["row", "exp_avg"])
def test_a_store_of_rows_that_are_not_finite_is_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Whoever wrote it sealed it, too."""
    step_of(job, 0, job.optimizer, max_grad_norm=1.0)
    table = job.model.user_encoder.table  # type: ignore[union-attr]
    tensor = table.detach() if field == "row" else job.optimizer.state[table][field]
    tensor[max(job.optimizer.unsaved_rows)] = float("nan")
    monkeypatch.setattr(job.optimizer, "is_finite", lambda parameter: True)
    directory = saved(job, tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"users: {field}: not finite; use another checkpoint"):
        load_checkpoint_(directory, job.model, job.optimizer, spec=job.spec, data_sha256=job.data_sha256)
    if field == "row":
        with pytest.raises(CheckpointError, match="users: row: not finite; use another checkpoint"):
            load_policy(directory)


def test_of_a_store_only_users_who_are_asked_for_are_read(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once; whom nobody trained, of whom an id is kept alone, is the generic user. Damage is found on reading."""
    for step in range(3):
        step_of(job, step, job.optimizer, max_grad_norm=1.0)
    directory = saved(job, tmp_path, 3)
    everybody = load_policy(directory).known_prompts()
    asked: list[str] = []
    read = UserStore.read
    monkeypatch.setattr(UserStore, "read", lambda store, ids, field="row": asked.extend(ids) or read(store, ids, field))
    model = load_policy(directory, rows_on_demand=True)
    encoder = model.user_encoder
    assert encoder is not None and asked == []
    with UserStore.open(directory / "users") as store:
        trained = [USERS.index(user) + 1 for user in store]
    rows = [trained[5], trained[2], trained[5], next(i for i in range(1, len(USERS)) if i not in trained)]
    for _ in range(2):
        assert torch.equal(encoder(torch.tensor(rows)), everybody[rows])
    assert sorted(asked) == sorted(USERS[row - 1] for row in set(rows[:3]))
    for shard in (directory / "users").glob("rows-*.bin"):
        shard.write_bytes(bytes(shard.stat().st_size))
    again = load_policy(directory, rows_on_demand=True)
    with pytest.raises(CheckpointError, match="damaged; use another checkpoint"):
        again.known_prompts()
    with pytest.raises(CheckpointError, match="content changed"):
        load_policy(directory)


def test_an_assistant_reads_the_row_of_whom_it_answers_and_no_other(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of(job, 0, job.optimizer, max_grad_norm=1.0)
    directory = saved(job, tmp_path, 1)
    with UserStore.open(directory / "users") as store:
        user = list(store)[-1]
    asked: list[str] = []
    read = UserStore.read
    monkeypatch.setattr(UserStore, "read", lambda store, ids, field="row": asked.extend(ids) or read(store, ids, field))
    assert isinstance(prlhf.load(tmp_path).answer("Tea?", user, max_new_tokens=1), str)
    assert asked == [user]


@pytest.mark.parametrize(
    ("num_users", "model"),
    [
        (1_000_000, partial(IndividualUserModel, num_user_tokens=10, dim=384)),
        (10_000_000, partial(LowRankUserModel, num_user_tokens=10, dim=384, rank=16)),
    ],
)
def test_large_tables_have_a_store_and_small_ones_none(num_users: int, model: partial[UserModel]) -> None:
    assert user_rows.stored_table(model(num_users=num_users)) is not None
    assert user_rows.stored_table(model(num_users=num_users // 1000)) is None


def test_a_checkpoint_from_before_a_table_had_a_store_goes_on_into_one(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of(job, 0, job.optimizer, max_grad_norm=1.0)
    with monkeypatch.context() as before:
        before.setattr(user_rows, "STORE_FROM_BYTES", 2**30)
        dense = saved(job, tmp_path, 1)
    assert not (dense / "users").exists()
    expected = state_of(job)
    again = build_job(job.config)
    load_checkpoint_(dense, again.model, again.optimizer, spec=job.spec, data_sha256=job.data_sha256)
    stored = saved(again, tmp_path / "again", 2)
    assert (stored / "users").is_dir() and (stored / "users.json").read_bytes() == (dense / "users.json").read_bytes()
    last = build_job(job.config)
    load_checkpoint_(stored, last.model, last.optimizer, spec=job.spec, data_sha256=job.data_sha256)
    actual = state_of(last)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_list_of_users_is_written_once_and_its_damage_is_found(job: Job, tmp_path: Path) -> None:
    first = saved(job, tmp_path, 1)
    step_of(job, 1, job.optimizer, max_grad_norm=1.0)
    second = saved(job, tmp_path, 2)
    assert (first / "users.json").samefile(second / "users.json")
    assert find_damage(second) == []
    (second / "users.json").write_text((second / "users.json").read_text().replace("u1", "u2"))
    step_of(job, 2, job.optimizer, max_grad_norm=1.0)
    [line] = find_damage(saved(job, tmp_path, 3))
    assert "users.json: content changed" in line


def saved_again(job: Job, run_dir: Path, step: int) -> Path:
    """A checkpoint for which every user moved; their rows and moments hold the step."""
    table = job.model.user_encoder.table  # type: ignore[union-attr]
    state = job.optimizer.state[table]
    if not state:
        state.update({name: torch.zeros_like(table) for name in ("exp_avg", "exp_avg_sq")})
        state["step"] = torch.zeros(len(table))
    with torch.no_grad():
        for tensor in (table, *state.values()):
            tensor.fill_(step)
    job.optimizer.unsaved_rows = set(range(len(table)))
    return saved(job, run_dir, step)


def holds(directory: Path, step: int) -> bool:
    """Whether a checkpoint is whole, and its store what `saved_again` wrote at the step."""
    assert find_damage(directory) == []
    with UserStore.open(directory / "users") as store:
        assert store.find_damage() == [] and sorted(store) == sorted(USERS)
        return all(bool(store.read(USERS, field).eq(step).all()) for field in ("row", "step", "exp_avg", "exp_avg_sq"))


def bytes_of_store(directory: Path) -> int:
    return sum(path.stat().st_size for path in (directory / "users").iterdir())


def test_older_versions_of_rows_are_never_more_than_the_users(job: Job, tmp_path: Path) -> None:
    job.config = replace(job.config, checkpoint=replace(job.config.checkpoint, keep_last=3))
    sizes = []
    for step in range(1, 8):
        sizes.append(bytes_of_store(saved_again(job, tmp_path, step)))
        for kept in range(max(1, step - 2), step + 1):
            assert holds(tmp_path / "checkpoints" / f"step-{kept:08d}", kept), "also of those before a fresh store"
    assert max(sizes) <= 2 * sizes[0] and sizes[2] == sizes[0]
    with UserStore.open(tmp_path / "checkpoints" / "step-00000007" / "users") as store:
        store.link_into(tmp_path / "linked")
        for step in range(8, 12):
            saved_again(job, tmp_path, step)
    with UserStore.open(tmp_path / "linked") as store:
        assert store.find_damage() == [] and bool(store.read(USERS).eq(7).all())


def test_a_store_that_is_made_anew_keeps_who_did_not_move_and_who_was_forgotten(job: Job, tmp_path: Path) -> None:
    directory = saved_again(job, tmp_path, 1)
    with UserStore.open(directory / "users", write=True) as store:
        store.forget(USERS[0])
    seal_directory(directory)
    for step in range(2, 6):
        job.optimizer.unsaved_rows = {1, 2, *range(5, 20)}
        with torch.no_grad():
            job.model.user_encoder.table[1] = step  # type: ignore[union-attr]
        directory = saved(job, tmp_path, step)
    with UserStore.open(directory / "users") as store:
        assert store.num_slots <= 2 * len(store) and sorted(store) == sorted(USERS[1:])
        assert store.is_forgotten(USERS[0])
        rows = store.read(USERS[1:])
        assert bool(rows[0].eq(5).all()) and bool(rows[1:].eq(1).all())


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_cut_short_while_a_store_is_made_anew_the_checkpoint_before_is_whole(
    job: Job, tmp_path: Path, stride: int
) -> None:
    for step in (1, 2):
        saved_again(job, tmp_path, step)
    with killed_at(10**6) as count:
        saved_again(job, tmp_path / "other", 3)
    for point in range(0, count[0], stride):
        for path in (tmp_path / "checkpoints").glob("*3"):
            shutil.rmtree(path)
        job.optimizer.saved_in = tmp_path / "checkpoints" / "step-00000002"
        with contextlib.suppress(Crash), killed_at(point):
            saved_again(job, tmp_path, 3)
        newest = find_checkpoint(tmp_path)
        assert newest is not None and holds(newest, int(newest.name[-1])), point
    assert bytes_of_store(saved_again(job, tmp_path, 4)) > 0 and holds(tmp_path / "checkpoints" / "step-00000004", 4)


def save_for_ever(job: Job, run_dir: Path, step: int, acknowledged: Any) -> None:
    while True:
        saved_again(job, run_dir, step)
        acknowledged.value = step
        step += 1


def test_kill_9_while_saving_loses_no_checkpoint(job: Job, tmp_path: Path) -> None:
    fork, moments, last = multiprocessing.get_context("fork"), random.Random(0), 1
    saved_again(job, tmp_path, 1)
    for num_kills in range(1, 41):  # on a machine that is busy fewer saves fall into a round
        acknowledged = fork.Value("q", last, lock=False)
        writer = fork.Process(target=save_for_ever, args=(job, tmp_path, last + 1, acknowledged))
        writer.start()
        time.sleep(moments.uniform(0.2, 1.2))
        writer.kill()
        writer.join()
        newest = find_checkpoint(tmp_path)
        assert newest is not None
        last = int(newest.name.removeprefix("step-"))
        assert last in (acknowledged.value, acknowledged.value + 1)  # killed between rename and acknowledgement
        assert holds(newest, last)
        job.optimizer.saved_in = newest
        if num_kills >= 4 and last > 5:
            break
    assert last > 5
