"""Forgetting takes everything that is the user's alone, leaves the others bitwise, and may be killed at any moment."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prlhf.adapt import forget
from prlhf.adapt.add_users import write_with_users
from prlhf.adapt.forget import forget_user
from prlhf.cli import main
from prlhf.engine.run_dir import RunDir
from prlhf.engine.tombstones import refuse_forgotten
from prlhf.engine.trainer import train
from prlhf.errors import CheckpointError, DataError, RunDirError
from prlhf.files import find_damage, seal_directory
from prlhf.models import load_model, load_policy
from tests.forget_run import CANARY_TEXT, bytes_of, contents, killed_at, logits_of, make_run
from tests.saved_policies import checkpoint_of, save_policy
from tests.tiny_run import (
    Crash,
    Tiny,
    at_step,
    crash,
    opposed_records,
    preference_record,
    snapshot,
    write_jsonl,
)

KINDS = ["uniform", "individual", "cluster", "low_rank", "text", "history"]


def rows_of(checkpoint: Path, place: int, num_users: int) -> list[bytes]:
    """The user's row in every table, and its moments, as they lie on the disk."""
    tensors = {**load_file(checkpoint / "users.safetensors"), **load_file(checkpoint / "optimizer.safetensors")}
    tables = [tensor for name, tensor in tensors.items() if "offsets" in name or "weights" in name]
    rows = [table[place + len(table) - num_users] for table in tables if table.dim() > 1]
    return [row.numpy().tobytes() for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_of_all_bytes_finds_nothing_of_the_user_and_the_others_answer_bitwise_alike(
    kind: str, tmp_path: Path
) -> None:
    user = secrets.token_hex(16)
    users, data = make_run(tmp_path / "run", user, user_kind=kind)
    before = load_model(tmp_path / "run")
    rows = rows_of(checkpoint_of(tmp_path / "run"), 1, 3)
    assert len(rows) == {"individual": 3, "cluster": 3, "low_rank": 3}.get(kind, 0)
    needles = [user.encode(), CANARY_TEXT.encode(), *rows]
    assert all(needle in bytes_of(tmp_path / "run") for needle in needles)
    receipt = forget_user(tmp_path / "run", user, data=data)
    for root in (tmp_path / "run", data):
        assert [needle for needle in needles if needle in bytes_of(root)] == []
    after = load_model(tmp_path / "run")
    for other in (None, "ann", "bob"):
        assert torch.equal(logits_of(after, other), logits_of(before, other))
    with pytest.raises(DataError, match="is not one of the 2 known users"):
        after.users.index(user)
    assert find_damage(checkpoint_of(tmp_path / "run")) == []
    assert receipt["removed"] and "Shared weights" in receipt["remains"][0]
    assert user not in json.dumps(receipt)


def test_what_is_not_the_users_stays(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "cat")
    checkpoint = checkpoint_of(tmp_path / "run")
    names = ("trainable.safetensors", "rng-0.safetensors", "config.yaml")
    kept = {name: (checkpoint / name).read_bytes() for name in names}
    old_users, old_moments = (load_file(checkpoint / f"{name}.safetensors") for name in ("users", "optimizer"))
    forget_user(tmp_path / "run", "cat")
    assert {name: (checkpoint / name).read_bytes() for name in kept} == kept
    assert json.loads((checkpoint / "users.json").read_text()) == {"user_ids": ["ann", "bob"]}
    new_users, new_moments = (load_file(checkpoint / f"{name}.safetensors") for name in ("users", "optimizer"))
    assert torch.equal(new_users["offsets"], old_users["offsets"][[0, 2]])
    assert torch.equal(new_users["generic"], old_users["generic"])
    for name, moment in new_moments.items():
        expected = old_moments[name][[0, 2]] if name.startswith("user_encoder.offsets.") else old_moments[name]
        assert torch.equal(moment, expected), name
    final = json.loads((tmp_path / "run" / "eval" / "final.json").read_text())
    assert (list(final["per_user"]), final["accuracy"]) == (["ann", "bob"], {"mean": 1})
    samples = (tmp_path / "run" / "samples" / "policy.jsonl").read_text().splitlines()
    assert [json.loads(line)["user_id"] for line in samples] == ["ann", "ann", "bob", "bob"]
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert metrics == ['{"step": 1, "loss": 0.7}'], "a line whose field is the id is about the user"
    assert not (tmp_path / "run" / "report.html").exists()


def test_what_stood_in_front_of_the_users_prompts_goes_from_the_checkpoint_and_marks_samples(tmp_path: Path) -> None:
    user = secrets.token_hex(16)
    make_run(tmp_path / "run", user, with_texts=True)
    receipt = forget_user(tmp_path / "run", user)
    assert any("user_texts.json" in what for what in receipt["removed"])
    left = bytes_of(tmp_path / "run")
    assert user.encode() not in left and CANARY_TEXT.encode() not in left
    assert load_policy(tmp_path / "run").user_texts == {"ann": "I am ann.", "bob": "I am bob."}


def test_forgetting_twice_changes_nothing_and_gives_the_receipt_again(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "cat")
    receipt = forget_user(tmp_path / "run", "cat")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert forget_user(tmp_path / "run", "cat") == receipt
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_an_id_that_is_nowhere_leaves_no_tombstone(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "cat")
    with pytest.raises(DataError, match="holds nothing of this user"):
        forget_user(tmp_path / "run", "ca")
    assert not (tmp_path / "run" / "tombstones.json").exists()
    with pytest.raises(CheckpointError, match="neither a run nor a checkpoint"):
        forget_user(tmp_path / "nowhere", "cat")
    assert not (tmp_path / "nowhere").exists()


def test_other_models_and_strange_files_in_a_runs_folder_stay_as_they_are(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "cat")
    shutil.copytree(checkpoint_of(tmp_path / "run"), tmp_path / "run" / "adapted")
    (tmp_path / "run" / "export").mkdir()
    (tmp_path / "run" / "export" / "export.json").write_text('{"user_ids": ["ann", "cat", "bob"]}')
    (tmp_path / "run" / "notes.json").write_text("{cat")
    (tmp_path / "run" / ".adapted.tmp-1").mkdir()
    folders = [tmp_path / "run" / name for name in ("adapted", "export", "notes.json", ".adapted.tmp-1")]
    before = [snapshot(folder) if folder.is_dir() else folder.read_bytes() for folder in folders]
    forget_user(tmp_path / "run", "cat")
    assert [snapshot(folder) if folder.is_dir() else folder.read_bytes() for folder in folders] == before


@pytest.mark.parametrize("word", ["user_ids", "accuracy", "num_rows", "failed", "generic"])
def test_a_word_of_ours_is_nobodys_id(word: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run", "cat")
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match="holds nothing of this user|who is nobody"):
        forget_user(tmp_path / "run", word)
    assert snapshot(tmp_path) == before


def test_a_link_to_a_checkpoint_stays_and_what_it_names_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_policy(tmp_path / "run", user_ids=["ann", "cat", "bob"])
    shutil.copytree(checkpoint_of(tmp_path / "run"), tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    forget_user(tmp_path / "link", "cat")
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "model")
    forget_user(Path(), "ann")
    assert load_policy(tmp_path / "model").users.user_ids == ("bob",)  # type: ignore[union-attr]
    assert not list(tmp_path.glob(".*"))


def test_one_call_at_a_time_and_a_runs_checkpoints_forget_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a checkpoint lies beside it: what is inside is replaced."""
    make_run(tmp_path / "run", "cat")
    checkpoint = checkpoint_of(tmp_path / "run")
    with pytest.raises(CheckpointError, match="a checkpoint of a run"):
        forget_user(checkpoint, "cat")
    adapted = tmp_path / "adapted"
    shutil.copytree(checkpoint, adapted)
    remove = forget.remove_user

    def remove_user(*args: Any) -> None:
        remove(*args)
        with pytest.raises(RunDirError, match="in use by process"):
            forget_user(adapted, "ann")

    with monkeypatch.context() as patch:
        patch.setattr(forget, "remove_user", remove_user)
        forget_user(adapted, "cat")
    forget_user(adapted, "ann")
    assert len(json.loads((adapted / "tombstones.json").read_text())["forgotten"]) == 2


def test_a_receipt_warns_of_data_unless_rows_were_taken_out(tmp_path: Path) -> None:
    _, data = make_run(tmp_path / "run", "cat")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Tea?", "chosen": "a", "rejected": "b"}])
    remains = forget_user(tmp_path / "run", "cat", data=other)["remains"]
    assert any(what.startswith("The data") for what in remains)
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"user_id": "cat", "pro')
    with pytest.raises(DataError, match="torn.jsonl:1"):
        forget_user(tmp_path / "again", "cat", data=torn)
    remains = forget_user(tmp_path / "again", "cat", data=data)["remains"]
    assert not any(what.startswith("The data") for what in remains)


def test_the_only_user_damaged_checkpoints_and_running_trainings_are_refused(tmp_path: Path) -> None:
    save_policy(tmp_path / "run", user_ids=["cat"])
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="the only one of this model"):
        forget_user(tmp_path / "run", "cat")
    make_run(tmp_path / "two" / "run", "cat")
    with RunDir(tmp_path / "two" / "run", writes=True), pytest.raises(RunDirError, match="in use"):
        forget_user(tmp_path / "two" / "run", "cat")
    (checkpoint_of(tmp_path / "two" / "run") / "trainable.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="delete the checkpoint"):
        forget_user(tmp_path / "two" / "run", "cat")
    assert not (tmp_path / "two" / "run" / "tombstones.json").exists()


@pytest.mark.parametrize(
    ("whole", "stride"),
    [
        ("run", 17),
        ("checkpoint", 11),
        pytest.param("run", 1, marks=pytest.mark.slow),
        pytest.param("checkpoint", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_a_second_call_ends_as_if_nothing_had_happened(
    whole: str, stride: int, tmp_path: Path
) -> None:
    make_run(tmp_path / "start" / "run", "cat", user_kind="history")
    source = tmp_path / "start" / "run" if whole == "run" else checkpoint_of(tmp_path / "start" / "run")
    directory = tmp_path / "work" / source.name
    shutil.copytree(source, directory)
    with killed_at(10**6) as count:
        forget_user(directory, "cat")
    expected, num_points = contents(directory.parent), count[0]
    assert num_points > 20
    for point in range(0, num_points, stride):
        shutil.rmtree(directory.parent)
        shutil.copytree(source, directory)
        with pytest.raises(Crash), killed_at(point):
            forget_user(directory, "cat")
        tombstones = directory / "tombstones.json"
        if tombstones.exists() and '"finished": null' in tombstones.read_text():
            with pytest.raises(RunDirError, match="cut short"):
                refuse_forgotten([directory], [])
        elif directory.exists() and not tombstones.exists():
            assert contents(directory).items() >= contents(source).items(), "nothing goes before the tombstone"
        with killed_at(10**6):
            forget_user(directory, "cat")
        assert contents(directory.parent) == expected, point
    refuse_forgotten([directory], ["ann"])


def test_a_user_added_to_frozen_weights_leaves_no_trace(tmp_path: Path) -> None:
    """As an adapted model is: the base's files and one more row."""
    save_policy(tmp_path / "run", user_ids=["ann", "bob"])
    base = load_policy(tmp_path / "run")
    adapted = tmp_path / "adapted"
    shutil.copytree(checkpoint_of(tmp_path / "run"), adapted)
    _add_row(adapted, "cat")
    assert not torch.equal(logits_of(load_policy(adapted), "cat"), logits_of(base, None))
    forget_user(adapted, "cat")
    after = load_policy(adapted)
    assert "cat" not in after.users
    for user in (None, "ann", "bob"):
        assert torch.equal(logits_of(after, user), logits_of(base, user))


@pytest.mark.parametrize(("kind", "shape"), [("individual", (3, 32)), ("cluster", (2,)), ("low_rank", (2,))])
def test_the_receipt_counts_who_else_has_the_users_row(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """As whom prlhf adapt finds to be like the user has; dan and eve are both like the generic user."""
    save_policy(tmp_path / "run", user_ids=["ann", "cat", "bob"], user_kind=kind)
    checkpoint, adapted = checkpoint_of(tmp_path / "run"), tmp_path / "adapted"
    model = load_model(checkpoint)
    encoder = model.user_encoder
    row, generic = encoder.table.detach()[1 + len(encoder.table) - 3], encoder.generic_state
    assert row.shape == generic.shape == shape
    write_with_users(checkpoint, adapted, model, {"fay": row, "gus": row, "dan": generic, "eve": generic}, {})
    shutil.copytree(adapted, tmp_path / "copy")
    with killed_at(10**6) as count:
        forget_user(tmp_path / "copy", "cat")
    with pytest.raises(Crash), killed_at(count[0] - 5):
        forget_user(adapted, "cat")
    assert "cat" not in load_policy(adapted).users
    assert '"finished": null' in (adapted / "tombstones.json").read_text()
    [line] = [line for line in forget_user(adapted, "cat")["remains"] if "very row" in line]
    assert "2 other users have it" in line
    [line] = [line for line in forget_user(adapted, "fay")["remains"] if "very row" in line]
    assert "1 other user has it" in line
    for user in ("gus", "dan", "bob"):
        assert not any("very row" in line for line in forget_user(adapted, user)["remains"])


def test_a_folder_inside_a_checkpoint_is_refused_before_anything_goes(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "cat")
    (checkpoint_of(tmp_path / "run") / "mine").mkdir()
    with pytest.raises(CheckpointError, match="cannot clean; nothing was changed"):
        forget_user(tmp_path / "run", "cat")
    assert not (tmp_path / "run" / "tombstones.json").exists()


def test_a_sealed_copy_of_a_tombstone_is_no_damage(tmp_path: Path) -> None:
    """As in a model adapted from one that had forgotten somebody."""
    save_policy(tmp_path / "run")
    adapted = tmp_path / "adapted"
    shutil.copytree(checkpoint_of(tmp_path / "run"), adapted)
    forget_user(adapted, "ann")
    seal_directory(adapted)
    with pytest.raises(Crash), killed_at(6):
        forget_user(adapted, "cat")
    [line] = find_damage(adapted)
    assert line.startswith(f"{adapted / 'tombstones.json'}: ")
    forget_user(adapted, "cat")
    assert find_damage(adapted) == []


def _add_row(checkpoint: Path, user_id: str) -> None:
    tables = load_file(checkpoint / "users.safetensors")
    tables["offsets"] = torch.cat([tables["offsets"], torch.ones_like(tables["offsets"][:1])])
    save_file(tables, checkpoint / "users.safetensors")
    moments = load_file(checkpoint / "optimizer.safetensors")
    for name in moments:
        if name.startswith("user_encoder.offsets."):
            moments[name] = torch.cat([moments[name], torch.zeros_like(moments[name][:1])])
    save_file(moments, checkpoint / "optimizer.safetensors")
    users = json.loads((checkpoint / "users.json").read_text())["user_ids"]
    (checkpoint / "users.json").write_text(json.dumps({"user_ids": [*users, user_id]}))
    seal_directory(checkpoint)


@pytest.mark.parametrize("settings", [{}, {"method": "dpo"}])
def test_training_goes_on_only_with_data_that_no_longer_holds_the_user(
    tiny: Tiny, tmp_path: Path, settings: dict[str, Any]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny.data, data)
    write_jsonl(data / "train.jsonl", [*opposed_records(["tea", "rain", "chess"]),
                                       preference_record("bread", "dan", prefers_short=True)])
    config = tiny.config(data__source=str(data), **settings)
    with pytest.raises(Crash), at_step(3, crash):
        train(config, tmp_path / "run")
    if config.method == "pdpo":
        forget_user(tmp_path / "run", "dan")
        with pytest.raises(DataError, match="the data holds the user of tombstone") as refusal:
            train(config, tmp_path / "run")
        assert "dan" not in str(refusal.value).replace(str(tmp_path), "")
    forget_user(tmp_path / "run", "dan", data=data)
    assert train(config, tmp_path / "run")["step"] == 4


def test_the_command_prints_what_went_and_what_cannot(tmp_path: Path, capsys: Any) -> None:
    _, data = make_run(tmp_path / "run", "cat")
    assert main(["forget", str(tmp_path / "run"), "--user", "cat", "--data", str(data)]) == 0
    out = capsys.readouterr().out
    for what in (
        "samples/policy.jsonl: 4 lines",
        "eval/final.json: 2 entries",
        "report.html",
        "data: train.jsonl: 1 lines",
        "step-00000007: the user's part of users.json, users.safetensors, optimizer.safetensors",
        "Shared weights",
    ):
        assert what in out
    assert "cat" not in out
    assert main(["forget", str(tmp_path / "run"), "--user", "nobody"]) == 2
