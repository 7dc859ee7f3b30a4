"""A crash at any moment leaves the last good checkpoint, and none is read before it is verified."""

from __future__ import annotations

import json
import logging
import math
import resource
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from prlhf.engine import checkpoint as checkpoint_module
from prlhf.engine.build import Job, build_job
from prlhf.engine.checkpoint import Progress, find_checkpoint, load_checkpoint_
from prlhf.engine.trainer import save_job, train
from prlhf.errors import CheckpointError, NoCheckpointError, RunDirError
from prlhf.models import load_policy, user_rows
from prlhf.usermodel import row_table
from prlhf.usermodel.store import UserStore
from tests.engine.cuts import step_of
from tests.engine.two_ranks import resumable, state_of
from tests.run_distributed import run_distributed_test
from tests.tiny_run import (
    Crash,
    Tiny,
    at_step,
    checkpoints,
    crash,
    perturbed_job,
    read_metrics,
    snapshot,
    write_data,
    write_model,
)

FILES = {
    "trainable.safetensors", "users.safetensors", "optimizer.safetensors", "rng-0.safetensors", "state.json",
    "config.yaml", "users.json", "tokenizer.json", "tokenizer_config.json", "manifest.json",
}


def trained_job(tiny: Tiny, **settings: Any) -> Job:
    """A job after one step, so that the optimizer has a state."""
    job = perturbed_job(tiny.config(**settings))
    step_of(job, 0, job.optimizer, max_grad_norm=1.0)
    return job


def saved(job: Job, run_dir: Path, step: int = 1) -> Path:
    save_job(job, Progress(step=step, rows_seen=4 * step), run_dir)
    return run_dir / "checkpoints" / f"step-{step:08d}"


def load_into(job: Job, directory: Path) -> Progress:
    return load_checkpoint_(directory, job.model, job.optimizer, spec=job.spec, data_sha256=job.data_sha256)


def damage(path: Path) -> None:
    """Flip one bit, which no file format notices."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def interrupted(tiny: Tiny, tmp_path: Path) -> Path:
    """A run of 6 steps that died in the fifth, with checkpoints of steps 2 and 4."""
    with pytest.raises(Crash), at_step(4, crash):
        train(tiny.config(train__max_steps=6), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-00000002", "step-00000004"]
    return tmp_path / "run"


def test_a_checkpoint_holds_the_documented_files(tiny: Tiny, tmp_path: Path) -> None:
    directory = saved(trained_job(tiny), tmp_path)
    assert {path.name for path in directory.iterdir()} >= FILES
    manifest = json.loads((directory / "manifest.json").read_text())["files"]
    assert set(manifest) == {path.name for path in directory.iterdir()} - {"manifest.json"}
    assert json.loads((directory / "users.json").read_text()) == {"user_ids": ["ann", "bob"]}
    assert all(name.startswith("base_model.model.") for name in load_file(directory / "trainable.safetensors"))
    assert set(load_file(directory / "users.safetensors")) == {"generic", "offsets"}


def test_tensor_files_have_no_metadata(tiny: Tiny, tmp_path: Path) -> None:
    """Its key order is random: equal weights would give unequal bytes."""
    files = list(saved(trained_job(tiny), tmp_path).glob("*.safetensors"))
    assert len(files) == 4
    for path in files:
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert "__metadata__" not in header


@pytest.mark.parametrize(
    "settings", [{}, {"user__kind": "cluster"}, {"model__lora": None}, {"method": "dpo"}, {"method": "sft"}]
)
def test_loading_puts_weights_optimizer_and_random_state_back_bitwise(
    tiny: Tiny, tmp_path: Path, settings: dict[str, Any]
) -> None:
    job = trained_job(tiny, **settings)
    directory = saved(job, tmp_path)
    drawn = torch.rand(3)
    again = build_job(tiny.config(**settings))
    assert load_into(again, directory) == Progress(step=1, rows_seen=4)
    expected, actual = state_of(job), state_of(again)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert torch.equal(torch.rand(3), drawn)


def test_a_loaded_policy_is_the_trained_one(tiny: Tiny, tmp_path: Path) -> None:
    job = trained_job(tiny)
    policy = load_policy(saved(job, tmp_path))
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, job.model.get_parameter(name)), name


def test_keep_last_counts_the_newest(tiny: Tiny, tmp_path: Path) -> None:
    job = trained_job(tiny, checkpoint__keep_last=2)
    for step in (8, 9, 10, 100):
        saved(job, tmp_path, step)
    assert checkpoints(tmp_path) == ["step-00000010", "step-00000100"]


def test_the_best_checkpoint_on_dev_rows_stays(tiny: Tiny, tmp_path: Path) -> None:
    """Of equal ones the earliest; a step that was never evaluated is not the best."""
    job = trained_job(tiny, checkpoint__keep_last=1)
    (tmp_path / "eval").mkdir()
    for step, accuracy in ((1, 0.5), (2, 0.75), (3, 0.75), (4, None), (5, 0.6)):
        saved(job, tmp_path, step)
        if accuracy is not None:
            figures = {"step": step, "accuracy": {"seen": {"mean": accuracy}}}
            (tmp_path / "eval" / f"step-{step:08d}.json").write_text(json.dumps(figures))
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000005"]


def test_the_best_checkpoint_goes_like_any_other_where_it_is_not_kept(tiny: Tiny, tmp_path: Path) -> None:
    job = trained_job(tiny, checkpoint__keep_last=1, checkpoint__keep_best=False)
    (tmp_path / "eval").mkdir()
    figures = {"step": 1, "accuracy": {"seen": {"mean": 1.0}}}
    (tmp_path / "eval" / "step-00000001.json").write_text(json.dumps(figures))
    for step in (1, 2):
        saved(job, tmp_path, step)
    assert checkpoints(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("point", ["seal_directory", "publish_directory", "write_json_atomic", "save_file"])
def test_a_crash_while_writing_leaves_the_previous_checkpoint(
    tiny: Tiny, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = trained_job(tiny)
    previous = saved(job, tmp_path)
    monkeypatch.setattr(checkpoint_module, point, lambda *_: crash())
    with pytest.raises(Crash):
        saved(job, tmp_path, 2)
    assert find_checkpoint(tmp_path) == previous


def test_what_a_crashed_write_left_is_removed_on_the_next_start(tiny: Tiny, interrupted: Path) -> None:
    stale = interrupted / "checkpoints" / ".tmp-step-00000005"
    stale.mkdir()
    (stale / "trainable.safetensors").write_bytes(b"half")
    train(tiny.config(train__max_steps=6), interrupted)
    assert checkpoints(interrupted) == ["step-00000004", "step-00000006"]


def test_a_full_disk_is_one_line_and_keeps_the_previous_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: the tensors do not fit, the small files do."""
    job = trained_job(tiny, model__lora=None)
    previous = saved(job, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunDirError, match=r"MiB free, about \d+ MiB needed.*previous checkpoint is kept") as caught:
            saved(job, tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(caught.value.messages) == 1
    assert find_checkpoint(tmp_path) == previous
    assert checkpoints(tmp_path) == [previous.name]


def changes(directory: Path, kind: str) -> None:
    path = directory / "trainable.safetensors"
    if kind == "flipped bit":
        damage(path)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif kind == "missing":
        path.unlink()
    elif kind == "swapped":
        shutil.copy(directory / "optimizer.safetensors", path)
    elif kind == "no manifest":
        (directory / "manifest.json").unlink()
    elif kind == "symlink":
        path.rename(directory.parent / "elsewhere")
        path.symlink_to(directory.parent / "elsewhere")


@pytest.mark.parametrize("kind", ["flipped bit", "truncated", "missing", "swapped", "no manifest", "symlink"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_previous_one_loudly(
    tiny: Tiny, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = trained_job(tiny)
    previous, newest = saved(job, tmp_path, 1), saved(job, tmp_path, 2)
    changes(newest, kind)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path) == previous
    assert f"checkpoint not used: {newest}" in caplog.text


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_run_that_lost_its_newest_checkpoint_ends_as_if_it_had_not(
    tiny: Tiny, interrupted: Path, tmp_path: Path, keep_last: int
) -> None:
    """The damaged one neither stays in the way of its step's new one nor counts among the last to keep."""
    settings = {"train__max_steps": 6, "checkpoint__keep_last": keep_last}
    train(tiny.config(**settings), tmp_path / "whole")
    damage(interrupted / "checkpoints" / "step-00000004" / "users.safetensors")
    train(tiny.config(**settings), interrupted)
    assert checkpoints(interrupted) == ["step-00000004", "step-00000006"][-keep_last:]
    for name in checkpoints(interrupted):
        for path in (interrupted / "checkpoints" / name).glob("*.safetensors"):
            whole = tmp_path / "whole" / "checkpoints" / name / path.name
            assert path.read_bytes() == whole.read_bytes(), f"{name}/{path.name}"
    load_policy(interrupted)


def test_a_finished_run_whose_last_checkpoint_is_damaged_makes_it_anew(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.config(), tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-00000004" / "trainable.safetensors"
    whole = last.read_bytes()
    damage(last)
    train(tiny.config(), tmp_path / "run")
    assert last.read_bytes() == whole


def test_a_run_without_a_sound_checkpoint_does_not_start_from_zero(tiny: Tiny, interrupted: Path) -> None:
    for name in checkpoints(interrupted):
        damage(interrupted / "checkpoints" / name / "state.json")
    before = snapshot(interrupted)
    with pytest.raises(NoCheckpointError, match="none of 2 checkpoint") as caught:
        train(tiny.config(train__max_steps=6), interrupted)
    assert caught.value.exit_code == 3
    assert snapshot(interrupted) == before


def test_a_damaged_checkpoint_named_on_the_command_line_is_refused(tiny: Tiny, interrupted: Path) -> None:
    directory = interrupted / "checkpoints" / "step-00000002"
    damage(directory / "trainable.safetensors")
    with pytest.raises(NoCheckpointError):
        train(tiny.config(train__max_steps=6), interrupted, resume=str(directory))


def test_another_base_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    directory = saved(trained_job(tiny), tmp_path / "run")
    other = Tiny(write_model(tmp_path / "model", seed=5), tiny.data)
    with pytest.raises(CheckpointError, match=r"base model changed since \(its weights differ\)"):
        load_into(build_job(other.config()), directory)


def test_another_architecture_around_the_same_weights_is_refused_and_has_another_reference(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Tiny(shutil.copytree(tiny.model, tmp_path / "model"), tiny.data)
    config = other.config(method="dpo", train__max_steps=1)
    train(config, tmp_path / "run")
    path = other.model / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "rms_norm_eps": 0.1, "use_cache": not values["use_cache"]}))
    for call in (lambda: train(other.config(method="dpo", train__max_steps=2), tmp_path / "run"),
                 lambda: load_policy(tmp_path / "run")):
        with pytest.raises(CheckpointError, match=r"\(rms_norm_eps: .*, now 0.1\)"):
            call()
    with caplog.at_level(logging.INFO, "prlhf"):
        train(config, tmp_path / "new")
    assert "0 of them kept from before" in caplog.text
    assert read_metrics(tmp_path / "new")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_other_training_data_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    directory = saved(trained_job(tiny), tmp_path / "run")
    other = Tiny(tiny.model, write_data(tmp_path / "data"))
    train_file = other.data / "train.jsonl"
    train_file.write_text(train_file.read_text().replace("It is tea.", "It is coffee."))
    with pytest.raises(CheckpointError, match="training data changed"):
        load_into(build_job(other.config()), directory)


def test_other_users_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Under new names the rows are the same indices: only the list of users tells."""
    directory = saved(trained_job(tiny), tmp_path / "run")
    other = Tiny(tiny.model, write_data(tmp_path / "data"))
    for path in other.data.iterdir():
        path.write_text(path.read_text().replace('"ann"', '"eve"'))
    with pytest.raises(CheckpointError, match="users changed") as caught:
        load_into(build_job(other.config()), directory)
    assert len(caught.value.messages) == 1


@pytest.fixture
def stored_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table of users is large, and goes into a store."""
    monkeypatch.setattr(row_table, "LARGE_TABLE_BYTES", 0)
    monkeypatch.setattr(user_rows, "STORE_FROM_BYTES", 0)


@pytest.mark.parametrize("kind", ["individual", pytest.param("low_rank", marks=pytest.mark.slow)])
def test_a_run_with_a_user_store_resumes_bitwise_and_is_loaded(
    tiny: Tiny, tmp_path: Path, stored_users: None, kind: str
) -> None:
    config = tiny.config(train__max_steps=6, user__kind=kind)
    train(config, tmp_path / "whole")
    with pytest.raises(Crash), at_step(4, crash):
        train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    directories = [tmp_path / name / "checkpoints" / "step-00000006" for name in ("whole", "cut")]
    stores = [UserStore.open(directory / "users") for directory in directories]
    users = list(stores[0])
    assert users and users == list(stores[1])
    for field in ("row", "step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(stores[0].read(users, field), stores[1].read(users, field))
    for store in stores:
        store.close()
    policies = [load_policy(directory) for directory in directories]
    for one, other in zip(policies[0].user_encoder.parameters(), policies[1].user_encoder.parameters(), strict=True):
        assert torch.equal(one, other)
    table = "offsets" if kind == "individual" else "weights"
    assert table not in load_file(directories[0] / "users.safetensors")
    assert not any(table in name for name in load_file(directories[0] / "optimizer.safetensors"))
    assert getattr(policies[0].user_encoder, table).flatten(1).ne(0).any(dim=1).sum() == len(users)


def test_a_store_in_a_checkpoint_holds_trained_users_only_and_its_damage_is_found(
    tiny: Tiny, tmp_path: Path, stored_users: None
) -> None:
    job = build_job(tiny.config())
    directory = saved(job, tmp_path)
    with UserStore.open(directory / "users") as store:
        assert len(store) == 0
    step_of(job, 0, job.optimizer, max_grad_norm=1.0)
    directory = saved(job, tmp_path, step=2)
    steps = job.optimizer.state[job.model.user_encoder.offsets]["step"]
    with UserStore.open(directory / "users") as store:
        assert set(store) == {job.model.users.user_ids[row] for row in steps.nonzero()[:, 0].tolist()}
    entries = json.loads((directory / "manifest.json").read_text())["files"]
    assert {name for name in entries if "/" in name} == {"users/index.sqlite", "users/tail-000000.bin"}
    damage(directory / "users/tail-000000.bin")
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000001"


def test_tokens_of_all_ranks_are_kept(tiny: Tiny, two_ranks: Path, tmp_path: Path) -> None:
    """Whichever world sizes the same rows were seen by; each rank pads its own micro-batches."""
    train(resumable(tiny), tmp_path / "one")
    alone, mixed = (
        json.loads((run_dir / "checkpoints" / "step-00000006" / "state.json").read_text())["tokens_seen"]
        for run_dir in (tmp_path / "one", two_ranks / "one_then_two")
    )
    assert mixed == pytest.approx(alone, rel=0.25)


def _save_slowly(tiny: Tiny, folder: Path) -> None:
    """On each rank; the main one's disk is slower than a collective waits."""
    job = trained_job(tiny)
    seal_directory = checkpoint_module.seal_directory

    def slowly(*args: Any) -> None:
        time.sleep(20)
        seal_directory(*args)

    with (
        mock.patch.object(checkpoint_module, "seal_directory", slowly),
        mock.patch.object(checkpoint_module, "SMALL", 0),
    ):
        saved(job, folder)


@pytest.mark.slow
def test_ranks_wait_for_a_slow_disk_longer_than_for_each_other(tiny: Tiny, tmp_path: Path) -> None:
    run_distributed_test(_save_slowly, 2, tiny, tmp_path, timeout_s=15)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000001"
