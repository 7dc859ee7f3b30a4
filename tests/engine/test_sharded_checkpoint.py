"""Checkpoints in parts: no rank holds the whole, and any number of ranks goes on from the same bits."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from prlhf.adapt import add_users
from prlhf.adapt.forget import forget_user
from prlhf.config import Config
from prlhf.distributed import barrier, is_main, rank
from prlhf.engine import checkpoint
from prlhf.engine.build import Job, build_job
from prlhf.engine.checkpoint import find_checkpoint
from prlhf.engine.evaluate import evaluate_checkpoint
from prlhf.engine.trainer import train
from prlhf.errors import CheckpointError, NoCheckpointError, Preempted, RunDirError
from prlhf.evaluation.report import load_final
from prlhf.files import find_damage, seal_directory
from prlhf.models import load_policy
from prlhf.models.run_folder import resolve_checkpoint
from prlhf.models.tensor_files import LAYOUT, StoredTensors, layout_path
from prlhf.serving.export import export_checkpoint
from tests.engine.test_checkpoint import load_into, saved, trained_job
from tests.engine.test_selection import SELECT, dev_accuracies
from tests.engine.test_trainer import assert_alike
from tests.engine.two_ranks import read, save, state_of
from tests.run_distributed import run_distributed_test
from tests.tiny_run import Tiny, at_step, checkpoints, stop_signal

FULL: dict[str, Any] = {"model__lora": None}
LORA: dict[str, Any] = {"model__lora__rank": 1}  # of A's single row rank 1 has none
SHARDED: dict[str, Any] = {"train__parallel": "fsdp"}
CASES: dict[str, dict[str, Any]] = {"full": FULL, "lora": LORA, "reward": {**FULL, "method": "prm"}}
SLOW = pytest.mark.slow
MOMENT = "backbone.model.norm.weight.exp_avg"


def begun(tiny: Tiny, **settings: Any) -> Config:
    """A run of five steps, full fine-tuning."""
    return tiny.config(name="begun", train__max_steps=5, **FULL, **settings)


def run_two_ranks(tiny: Tiny, folder: Path) -> None:
    """On each of two ranks, what the default tests look at."""
    for name in ("full", "lora"):
        write_and_read(tiny, folder, name)
    save(folder, "full_disk", save_without_room(trained_job(tiny, **FULL, **SHARDED), folder / "full_disk"))
    for name, break_ in (("nan", break_a_row), ("short", lose_a_row)):
        save(folder, name, load_what_is_broken(tiny, folder / "full", folder / name, break_))
    with pytest.raises(Preempted), at_step(2, stop_signal):
        train(begun(tiny, **SHARDED, checkpoint__every_steps=1), folder / "begun")
    with dev_accuracies({2: 0.9, 4: 0.4}):
        train(tiny.config(**FULL, **SHARDED, **SELECT), folder / "selected")


def run_two_ranks_further(tiny: Tiny, folder: Path) -> None:
    """On each of two ranks, what the slow tests look at: runs go on."""
    write_and_read(tiny, folder, "reward")
    train(begun(tiny, **SHARDED), folder / "same")
    train(begun(tiny), folder / "ddp")


def write_and_read(tiny: Tiny, folder: Path, name: str) -> None:
    """Write a checkpoint in parts, and read it again, sharded and whole."""
    job = trained_job(tiny, **CASES[name], **SHARDED)
    with gathered_bytes() as gathered:
        directory = saved(job, folder / name)
    save(folder, name, {"state": state_of(job), "gathered": gathered})
    for again, parallel in (("sharded", SHARDED), ("whole", {})):
        other = build_job(tiny.config(**CASES[name], **parallel))
        load_into(other, directory)
        save(folder, f"{name}-{again}", state_of(other))


@contextmanager
def gathered_bytes() -> Iterator[list[int]]:
    """Inside, the bytes of each tensor that is gathered whole are noted."""
    gathered: list[int] = []
    full_tensor = DTensor.full_tensor

    def noted(self: DTensor, *args: Any, **options: Any) -> Tensor:
        gathered.append(self.nbytes)
        return full_tensor(self, *args, **options)

    with mock.patch.object(DTensor, "full_tensor", noted):
        yield gathered


def save_without_room(job: Job, run_dir: Path) -> list[str]:
    """Rank 1's disk takes no more at its second part."""
    write = checkpoint.save_file

    def refuse(tensors: dict[str, Tensor], path: Path) -> None:
        if rank() == 1 and path.name.startswith("optimizer.rank"):
            raise OSError(28, "No space left on device")
        write(tensors, path)

    with mock.patch.object(checkpoint, "save_file", refuse), pytest.raises(RunDirError) as caught:
        saved(job, run_dir)
    return caught.value.messages


def load_what_is_broken(tiny: Tiny, source: Path, target: Path, break_: Callable[[Path], None]) -> list[str]:
    """What is said of a copy that is sealed all the same."""
    directory = target / "checkpoints" / "step-00000001"
    if is_main():
        shutil.copytree(source, target)
        break_(directory)
        seal_directory(directory)
    barrier()
    with pytest.raises(CheckpointError) as caught:
        load_into(build_job(tiny.config(**FULL, **SHARDED)), directory)
    return caught.value.messages


def break_a_row(directory: Path) -> None:
    """Of the rows that rank 1 reads, and rank 0 does not, one number is none."""
    (part,) = directory.glob("trainable.rank00001-*")
    state = {name: tensor.clone() for name, tensor in load_file(part).items()}
    state["model.norm.weight"][-1] = math.nan
    save_file(state, part)


def lose_a_row(directory: Path) -> None:
    """Moments in one file, of which one has a row too few."""
    path = directory / "optimizer.safetensors"
    stored = StoredTensors(path)
    state = {name: stored.read(name).clone() for name in stored.kinds}
    layout_path(path).unlink()
    save_file({**state, MOMENT: state[MOMENT][:-1].clone()}, path)


def test_ranks_end_with_the_weights_that_dev_rows_choose(parts: Path) -> None:
    assert (load_final(parts / "selected")["step"], resolve_checkpoint(parts / "selected").name) == (
        2, "step-00000002"
    )
    again = evaluate_checkpoint(parts / "selected", source=None, overrides=[])
    assert again["accuracy"] == load_final(parts / "selected")["accuracy"]


@pytest.fixture(scope="module")
def parts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `run_two_ranks` filled."""
    folder = tmp_path_factory.mktemp("parts")
    run_distributed_test(run_two_ranks, 2, tiny, folder)
    return folder


@pytest.fixture(scope="module")
def further(tiny: Tiny, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `run_two_ranks_further` filled, with the run that one rank is to go on with."""
    folder = tmp_path_factory.mktemp("further")
    for name in ("same", "ddp", "one"):
        shutil.copytree(parts / "begun", folder / name)
    run_distributed_test(run_two_ranks_further, 2, tiny, folder)
    train(begun(tiny), folder / "one")
    return folder


@pytest.fixture
def run_dir(parts: Path, tmp_path: Path) -> Path:
    """A copy of the run that was stopped after three steps, with checkpoints of steps 2 and 3."""
    shutil.copytree(parts / "begun", tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-00000002", "step-00000003"]
    return tmp_path / "run"


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / checkpoints(run_dir)[-1]


@pytest.mark.parametrize(("case", "share"), [("full", 0.5), ("lora", 0.8)])
def test_no_rank_holds_the_whole(parts: Path, case: str, share: float) -> None:
    """Each writes its rows, and gathers nothing for it; of a matrix of one row the second rank has none."""
    assert [seen["gathered"] for seen in read(parts, case)] == [[], []]
    directory = newest(parts / case)
    own = []
    for number in range(2):
        files = list(directory.glob(f"*.rank0000{number}-of-00002.safetensors"))
        assert len(files) == 2
        own.append(sum(tensor.nbytes for path in files for tensor in load_file(path).values()))
    assert min(own) > 0 and max(own) <= share * sum(own)
    assert find_damage(directory) == []


@pytest.mark.parametrize("case", ["full", "lora", pytest.param("reward", marks=SLOW)])
def test_weights_and_moments_come_back_bitwise(tiny: Tiny, request: pytest.FixtureRequest, case: str) -> None:
    """Into two ranks with shards, two without, and one process."""
    parts = request.getfixturevalue("further" if case == "reward" else "parts")
    expected = read(parts, case)[0]["state"]
    alone = build_job(tiny.config(**CASES[case]))
    load_into(alone, newest(parts / case))
    for actual in [state_of(alone), *read(parts, f"{case}-sharded"), *read(parts, f"{case}-whole")]:
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_what_is_small_stays_whole(further: Path) -> None:
    """A reward model's head, step counts, and all that is the users'."""
    directory = newest(further / "reward")
    assert set(load_file(directory / "trainable.safetensors")) == {"score.weight"}
    users = {"generic", "offsets"}
    assert set(load_file(directory / "users.safetensors")) == users
    kept = load_file(directory / "optimizer.safetensors")
    own = {name for name in kept if not name.startswith("backbone.")}
    names = ("score.weight", *(f"user_encoder.{name}" for name in users))
    assert own == {f"{name}.{slot}" for name in names for slot in ("step", "exp_avg", "exp_avg_sq")}
    assert {tensor.dim() for name, tensor in kept.items() if name not in own} == {0}


def test_a_checkpoint_of_whole_tensors_has_no_parts(tiny: Tiny, tmp_path: Path) -> None:
    directory = saved(trained_job(tiny, **FULL), tmp_path)
    assert [path.name for path in directory.iterdir() if ".rank" in path.name or path.name.endswith(LAYOUT)] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["same", "ddp", "one"])
def test_a_run_goes_on_with_as_many_ranks_and_others(tiny: Tiny, further: Path, tmp_path: Path, name: str) -> None:
    train(begun(tiny), tmp_path / "run")
    assert_alike(further / name, tmp_path / "run")
    assert bool(list(newest(further / name).glob("*.rank*"))) == (name == "same")


def test_a_disk_that_is_full_on_one_rank_stops_all(parts: Path) -> None:
    (own,), (other,) = read(parts, "full_disk")[::-1]
    assert "No space left on device" in own and "MiB needed" in own
    assert other.endswith("another rank could not write its part; see its log")
    assert checkpoints(parts / "full_disk") == []


def test_ranks_refuse_together_what_one_of_them_reads(parts: Path) -> None:
    (main,), (other,) = read(parts, "nan")
    assert main.endswith("trainable.safetensors: not finite: what another rank reads; use another checkpoint")
    assert other.endswith("trainable.safetensors: not finite: model.norm.weight; use another checkpoint")


def test_moments_of_another_shape_are_refused(parts: Path) -> None:
    for (message,) in read(parts, "short"):
        assert message.endswith(f"optimizer.safetensors: {MOMENT}: got (31,), expected (32,); use another checkpoint")


def test_a_damaged_or_missing_part_is_found_and_the_older_checkpoint_taken(run_dir: Path) -> None:
    directory = newest(run_dir)
    names = sorted(path.name for path in directory.iterdir() if ".rank" in path.name or path.name.endswith(LAYOUT))
    assert len(names) == 6
    for name in names:
        data = (directory / name).read_bytes()
        for damaged in (None, data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
            (directory / name).unlink()
            if damaged is not None:
                (directory / name).write_bytes(damaged)
            assert find_checkpoint(run_dir) == run_dir / "checkpoints" / "step-00000002"
            (directory / name).write_bytes(data)
        assert find_checkpoint(run_dir) == directory
    (directory / names[-1]).unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step-00000002")
    with pytest.raises(NoCheckpointError):
        find_checkpoint(run_dir)


def test_a_part_that_was_sealed_as_it_is_must_hold_its_rows(run_dir: Path) -> None:
    directory = newest(run_dir)
    first, second = sorted(directory.glob("trainable.rank*"))
    state = load_file(first)
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in state.items()}, second)
    seal_directory(directory)
    with pytest.raises(CheckpointError, match=rf"{second}: model.embed_tokens.weight: not rows 150 to 300; use"):
        load_policy(directory)


def test_a_policy_in_parts_answers_and_is_exported(run_dir: Path, tmp_path: Path) -> None:
    policy = load_policy(run_dir)
    stored = StoredTensors(newest(run_dir) / "trainable.safetensors")
    for name, parameter in policy.backbone.named_parameters():
        assert torch.equal(parameter, stored.read(name)), name
    export_checkpoint(run_dir, "merged", tmp_path / "merged")
    exported = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(exported["model.norm.weight"], stored.read("model.norm.weight"))


def test_a_user_leaves_a_checkpoint_in_parts(tiny: Tiny, run_dir: Path) -> None:
    """Row and moments go from the main file; the parts, which hold nothing of a user, stay as they are."""
    before = newest(run_dir)
    rows = {name: (before / name).read_bytes() for name in ("users.safetensors", "optimizer.safetensors")}
    offsets = load_file(before / "users.safetensors")["offsets"]
    own, other = offsets[1].numpy().tobytes(), offsets[0].numpy().tobytes()
    kept = {path.name: path.read_bytes() for path in before.iterdir() if ".rank" in path.name}
    assert own in rows["users.safetensors"]
    forget_user(run_dir, "bob")
    for directory in (run_dir / "checkpoints").iterdir():
        assert find_damage(directory) == []
        assert all(own not in path.read_bytes() for path in directory.iterdir())
        moments = load_file(directory / "optimizer.safetensors")
        assert {len(moments[f"user_encoder.offsets.{slot}"]) for slot in ("exp_avg", "exp_avg_sq", "step")} == {1}
    assert {name: (newest(run_dir) / name).read_bytes() for name in kept} == kept
    assert other in (newest(run_dir) / "users.safetensors").read_bytes()
    assert load_policy(run_dir).users.user_ids == ("ann",)


def test_an_added_user_leaves_the_moments_behind(run_dir: Path, tmp_path: Path) -> None:
    policy = load_policy(run_dir)
    row = policy.user_encoder.table[0].detach()
    add_users.write_with_users(newest(run_dir), tmp_path / "out", policy, {"dan": row}, {})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in names if name.startswith(("optimizer", "rng"))]
    assert {f"trainable{LAYOUT}", "trainable.rank00001-of-00002.safetensors"} <= names
    assert load_policy(tmp_path / "out").users.user_ids == ("ann", "bob", "dan")
