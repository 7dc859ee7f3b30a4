"""Weights are hashed once, and anew as soon as a file that they come from is another one."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from prlhf.errors import CheckpointError
from prlhf.models import weights_hash
from prlhf.models.assemble import PolicySpec, load_policy, make_policy
from prlhf.models.backbone import hash_state, load_backbone
from tests.saved_policies import save_policy
from tests.tiny_run import Tiny, write_model

PAST_S = time.time() - 1000


def set_back(folder: Path, seconds: float = 0) -> None:
    """Files that nobody has written lately."""
    for path in folder.iterdir():
        os.utime(path, (PAST_S - seconds, PAST_S - seconds))


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny.model, tmp_path / "model")
    set_back(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every hash that is computed, not remembered."""
    digests: list[str] = []

    def counting(backbone: Any) -> str:
        digests.append(hash_state(backbone))
        return digests[-1]

    monkeypatch.setattr(weights_hash, "hash_state", counting)
    return digests


def digest_of(folder: Path | str, dtype: str = "float32") -> str:
    return make_policy(PolicySpec(str(folder), dtype=dtype), []).base_sha256  # type: ignore[arg-type]


def test_weights_are_hashed_at_the_first_load_alone(folder: Path, hashed: list[str]) -> None:
    expected = hash_state(load_backbone(str(folder))[0])
    assert [digest_of(folder) for _ in range(3)] == 3 * [expected]
    assert len(hashed) == 1
    assert digest_of(folder, "bfloat16") != expected and len(hashed) == 2


@pytest.mark.parametrize("change", ["weights", "time", "config", "path"])
def test_other_files_are_hashed_anew(folder: Path, hashed: list[str], tmp_path: Path, change: str) -> None:
    first = digest_of(folder)
    if change == "weights":  # as many bytes as before
        write_model(folder, seed=1)
        set_back(folder, seconds=1)
    elif change == "time":
        set_back(folder, seconds=1)
    elif change == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    else:
        folder = folder.rename(tmp_path / "moved")
    assert (digest_of(folder) == first) == (change != "weights")
    assert len(hashed) == 2


def test_files_that_were_just_written_are_not_remembered(folder: Path, hashed: list[str], tmp_path: Path) -> None:
    os.utime(folder / "model.safetensors")
    digest_of(folder)
    digest_of(folder)
    assert len(hashed) == 2 and not (tmp_path / "cache").exists()


def test_files_that_change_while_they_are_read_are_not_remembered(
    folder: Path, hashed: list[str], tmp_path: Path
) -> None:
    files = weights_hash.state_of_files(str(folder))
    backbone, _ = load_backbone(str(folder))
    set_back(folder, seconds=1)
    assert weights_hash.hash_weights(backbone, str(folder), dtype="float32", files=files) == hash_state(backbone)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["", "{}", '{"sha256": "ab"}', '{"sha256": 1}', "[]"])
def test_a_damaged_note_is_not_believed(folder: Path, hashed: list[str], tmp_path: Path, damage: str) -> None:
    first = digest_of(folder)
    [note] = (tmp_path / "cache" / "weights").iterdir()
    whole = note.read_text()
    note.write_text(damage)
    assert digest_of(folder) == first and len(hashed) == 2
    assert note.read_text() == whole


def test_where_nothing_can_be_noted_weights_are_hashed_each_time(
    folder: Path, hashed: list[str], tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()
    assert digest_of(folder) == digest_of(folder) and len(hashed) == 2


def test_a_hub_id_is_known_by_the_files_in_the_hubs_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights_hash.state_of_files("nobody/nothing") == []
    monkeypatch.setattr(weights_hash, "try_to_load_from_cache", lambda name, file: str(folder / file))
    assert weights_hash.state_of_files("owner/name") == weights_hash.state_of_files(str(folder)) != []


def test_random_weights_come_from_no_file(folder: Path, hashed: list[str]) -> None:
    assert digest_of("builtin:scratch") == digest_of("builtin:scratch")
    assert len(hashed) == 2


def test_a_checkpoint_on_weights_that_changed_is_refused_as_before(folder: Path, tmp_path: Path) -> None:
    save_policy(tmp_path / "run", user_ids=["ann"])
    state = json.loads(next((tmp_path / "run").rglob("state.json")).read_text())
    backbone = Path(state["policy"]["backbone"])
    set_back(backbone)
    load_policy(tmp_path / "run")
    write_model(backbone, seed=5)
    set_back(backbone, seconds=1)
    with pytest.raises(CheckpointError, match="trained on another base model"):
        load_policy(tmp_path / "run")
