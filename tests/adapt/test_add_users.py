"""Adding users may be killed at any moment, and does not bring back who was forgotten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prlhf.adapt.add_users import check_new, write_with_users
from prlhf.adapt.forget import forget_user
from prlhf.cli import main
from prlhf.data.context import UserFacts
from prlhf.errors import CheckpointError, DataError, RunDirError
from prlhf.files import find_damage, lock_beside, seal_directory
from prlhf.models import PersonalizedModel, load_model
from prlhf.serving.export import export_checkpoint
from tests.forget_run import CANARY_TEXT, bytes_of, killed_at, make_run
from tests.saved_policies import checkpoint_of, save_policy
from tests.tiny_run import Crash

DORA = "dora-5f1c9a7e"


def add(run: Path, out: Path, model: PersonalizedModel) -> None:
    """Dora, of whom a row or a text is kept, and what stands in front of her prompts."""
    reads = model.contexts is not None
    states = {} if reads else {DORA: torch.ones(3, 32)}
    facts = {DORA: UserFacts(text=CANARY_TEXT)} if reads else {}
    figures = [{"user_id": DORA, "judgments": 4, "probability": 0.9, "leave_one_out": 0.75, "held_out": None}]
    write_with_users(checkpoint_of(run), out, model, states, facts, {DORA: CANARY_TEXT}, figures)


def holds_dora(folder: Path) -> bool:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return any(needle in bytes_of(folder) for needle in (DORA.encode(), CANARY_TEXT.encode())) or DORA in str(names)


@pytest.mark.parametrize("kind", ["individual", "text"])
def test_killed_at_any_moment_nothing_of_the_user_outlives_a_forgetting(kind: str, tmp_path: Path) -> None:
    save_policy(tmp_path / "run", user_kind=kind)
    model, models = load_model(tmp_path / "run"), tmp_path / "models"
    with killed_at(10**6) as count:
        add(tmp_path / "run", models / "dora", model)
    num_points = count[0]
    assert num_points > 15
    left = 0
    for point in range(num_points):
        for again in (True, False):
            shutil.rmtree(models)
            with pytest.raises(Crash), killed_at(point):
                add(tmp_path / "run", models / "dora", model)
            left += any(path.name.startswith(".dora.tmp-") for path in models.iterdir())
            with killed_at(10**6):
                if again and not (models / "dora").exists():
                    add(tmp_path / "run", models / "dora", model)
                if (models / "dora").exists() or any(models.glob(".dora.tmp-*")):
                    _forget(models / "dora")
            assert not holds_dora(models), (point, again)
            assert {path.name for path in models.iterdir()} <= {"dora", ".lock-dora"}
    assert left > 10


def _forget(out: Path) -> None:
    if out.exists():
        forget_user(out, DORA)
    else:
        with pytest.raises(CheckpointError, match="never finished"):
            forget_user(out, DORA)


def test_an_export_takes_the_place_of_one_that_was_killed(tmp_path: Path) -> None:
    save_policy(tmp_path / "run")
    (tmp_path / ".out.tmp-1").mkdir()
    (tmp_path / ".out.tmp-1" / "export.json").touch()
    for other in (".out2.tmp-1", ".out.tmp-mine"):
        (tmp_path / other).mkdir()
    export_checkpoint(tmp_path / "run", "merged", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".out.tmp-mine", ".out2.tmp-1"]


def test_what_another_process_is_writing_is_left_to_it(tmp_path: Path) -> None:
    save_policy(tmp_path / "run")
    (tmp_path / ".out.tmp-1").mkdir()
    with lock_beside(tmp_path / "out"):
        for refused in (
            lambda: export_checkpoint(tmp_path / "run", "merged", tmp_path / "out"),
            lambda: add(tmp_path / "run", tmp_path / "out", load_model(tmp_path / "run")),
            lambda: forget_user(tmp_path / "out", DORA),
        ):
            with pytest.raises(RunDirError, match="in use by process"):
                refused()
    assert (tmp_path / ".out.tmp-1").is_dir()


def test_who_was_forgotten_is_not_added_again_here_nor_to_what_comes_from_here(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "cat")
    run, first, second = checkpoint_of(tmp_path / "run"), tmp_path / "first", tmp_path / "second"
    with pytest.raises(Crash), killed_at(12):
        forget_user(tmp_path / "run", "cat")
    with pytest.raises(RunDirError, match="cut short"):
        check_new(run, ["dora"], first)
    forget_user(tmp_path / "run", "cat")
    add(tmp_path / "run", first, load_model(run))
    forget_user(first, DORA)
    write_with_users(first, second, load_model(first), {"eve": torch.ones(3, 32)}, {})
    for checkpoint, users in ((run, ["cat"]), (first, ["cat", DORA]), (second, ["cat", DORA])):
        with pytest.raises(DataError) as refusal:
            check_new(checkpoint, [*users, "fay"], tmp_path / "out")
        assert len(refusal.value.messages) == len(users)
        assert all("was forgotten" in message for message in refusal.value.messages)
    forget_user(second, "eve")
    assert forget_user(second, "cat")["removed"] == forget_user(tmp_path / "run", "cat")["removed"]
    assert len(json.loads((tmp_path / "run" / "tombstones.json").read_text())["forgotten"]) == 1
    assert find_damage(first) == [], "its tombstones are not those that the second one changed"


def test_an_adapted_checkpoint_keeps_the_bases_figures_and_the_new_users_fit_until_they_are_forgotten(
    tmp_path: Path, capsys: Any
) -> None:
    make_run(tmp_path / "run", "cat")
    final = tmp_path / "run" / "eval" / "final.json"
    block = {"mean": 0.75, "ci95": [0.5, 1.0], "worst_user": 0.25, "num_rows": 8, "num_users": 3}
    parts = {"data": {"source": "data/mine", "train_rows": 12}, "accuracy": {"seen": block}}
    final.write_text(json.dumps({**json.loads(final.read_text()), **parts}))
    first, second = tmp_path / "first", tmp_path / "second"
    add(tmp_path / "run", first, load_model(tmp_path / "run"))
    figures = [{"user_id": "eve", "judgments": 2, "leave_one_out": 0.5}]
    write_with_users(first, second, load_model(first), {"eve": torch.ones(3, 32)}, {}, None, figures)
    assert main(["users", str(second)]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[1:6]] == [
        ["ann", "0.500", "2"], ["cat", "0.500", "2"], ["bob", "0.500", "2"], [DORA, "4", "0.750"], ["eve", "2", "0.500"]
    ]
    assert "accuracy, as generic, rows: of run at step 7, before users were added" in out
    export_checkpoint(second, "merged", tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "| seen | 0.750 | 0.500 to 1.000 | 0.250 | 8 | 3 |" in card and "of the run run, before users" in card
    assert "`data/mine`, 12 training rows of the run run, to which users were added later." in card
    assert "added 2 of the users after training, from 6 judgments" in card
    assert "is 0.625\non average and 0.500 at worst" in card and DORA not in card
    for user in (DORA, "cat"):
        assert any("figures.json" in what for what in forget_user(second, user)["removed"])
    kept = json.loads((second / "figures.json").read_text())
    assert list(kept["base"]["per_user"]) == ["ann", "bob"] and [own["user_id"] for own in kept["added"]] == ["eve"]
    (first / "figures.json").unlink()  # as an earlier version wrote it
    seal_directory(first)
    assert main(["users", str(first)]) == 0
    assert capsys.readouterr().out.split() == ["user", "ann", "cat", "bob", DORA]
