"""A reader sees the old file or the new one, and a sealed directory tells when a byte of it has changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prlhf.errors import CheckpointError, RunDirError
from prlhf.files import (
    MANIFEST,
    find_damage,
    make_place,
    publish_directory,
    read_json,
    remove_directories,
    seal_directory,
    sha256_of,
    write_json_atomic,
    write_text_atomic,
)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    directory = tmp_path / "sealed"
    directory.mkdir()
    (directory / "a.bin").write_bytes(b"aaaa")
    (directory / "b.bin").write_bytes(b"bbbb")
    seal_directory(directory)
    return directory


def test_writing_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text_atomic(path, "a longer old text")
    write_text_atomic(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text_atomic(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_text_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (seen.append(path.exists()), fsync(descriptor))[1])
    write_text_atomic(path, "text")
    assert seen == [False, True], "the file before the rename, the directory after it"


def test_json_is_strict_and_keeps_text_readable(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json_atomic(path, {"user": "Ā/../", "share": 0.5})
    assert "Ā/../" in path.read_text(encoding="utf-8")
    assert read_json(path) == {"user": "Ā/../", "share": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"share": float("nan")})
    assert read_json(path) == {"user": "Ā/../", "share": 0.5}


def test_reading_names_the_file_that_is_missing_or_malformed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'state.json'}: no such file"):
        read_json(tmp_path / "state.json")
    (tmp_path / "state.json").write_text('{"step": ')
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'state.json'}: not valid JSON"):
        read_json(tmp_path / "state.json")


def test_the_manifest_holds_size_and_sha256_of_every_file(sealed: Path) -> None:
    assert json.loads((sealed / MANIFEST).read_text()) == {
        "files": {
            "a.bin": {"size": 4, "sha256": hashlib.sha256(b"aaaa").hexdigest()},
            "b.bin": {"size": 4, "sha256": hashlib.sha256(b"bbbb").hexdigest()},
        }
    }


def test_sha256_is_of_the_whole_file(tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20 + 1)
    (tmp_path / "large").write_bytes(data)
    assert sha256_of(tmp_path / "large") == hashlib.sha256(data).hexdigest()


def test_an_unchanged_directory_has_no_damage(sealed: Path) -> None:
    assert find_damage(sealed) == []


def test_each_kind_of_damage_is_named(sealed: Path) -> None:
    (sealed / "a.bin").write_bytes(b"aaab")
    (sealed / "b.bin").write_bytes(b"bbb")
    assert find_damage(sealed) == [
        f"{sealed / 'a.bin'}: content changed (sha256 differs)",
        f"{sealed / 'b.bin'}: 3 bytes, expected 4",
    ]
    (sealed / "a.bin").unlink()
    assert f"{sealed / 'a.bin'}: missing" in find_damage(sealed)


def test_links_and_names_outside_the_directory_are_damage(sealed: Path, tmp_path: Path) -> None:
    (sealed / "b.bin").rename(tmp_path / "outside")
    (sealed / "b.bin").symlink_to(tmp_path / "outside")
    assert find_damage(sealed) == [f"{sealed / 'b.bin'}: not a plain file of this directory"]
    manifest = {"files": {"../outside": {"size": 4, "sha256": hashlib.sha256(b"bbbb").hexdigest()}}}
    (sealed / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    assert find_damage(sealed) == [f"{sealed / '../outside'}: not a plain file of this directory"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"files": []}', '{"files": {"a.bin": 4}}'])
def test_a_directory_without_a_readable_manifest_is_damaged(sealed: Path, text: str | None) -> None:
    (sealed / MANIFEST).unlink()
    if text is not None:
        (sealed / MANIFEST).write_text(text)
    assert find_damage(sealed) == [f"{sealed / MANIFEST}: missing or malformed"]


@pytest.mark.parametrize("bit", range(8))
def test_a_manifest_with_a_byte_changed_or_cut_off_is_damage(sealed: Path, bit: int) -> None:
    """Also where it is still JSON that says the same, such as without its last line break."""
    data = (sealed / MANIFEST).read_bytes()
    for place in range(len(data)):
        (sealed / MANIFEST).write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        assert find_damage(sealed), place
    (sealed / MANIFEST).write_bytes(data[:-1])
    assert find_damage(sealed)


def test_publishing_moves_the_whole_directory(sealed: Path, tmp_path: Path) -> None:
    publish_directory(sealed, tmp_path / "final")
    assert not sealed.exists()
    assert find_damage(tmp_path / "final") == []


def test_what_is_published_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        (tmp_path / "new").mkdir()
        save_file({"a": torch.zeros(2)}, tmp_path / "new" / "a.safetensors")
        publish_directory(tmp_path / "new", tmp_path / "final")
        assert (tmp_path / "final" / "a.safetensors").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_folder_that_takes_no_file_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(RunDirError, match=f"{tmp_path}/a.json: cannot be written, as {tmp_path} is read-only"):
        make_place(tmp_path / "a.json")


def test_removing_takes_what_is_there(sealed: Path, tmp_path: Path) -> None:
    remove_directories([tmp_path / "gone", sealed])
    assert list(tmp_path.iterdir()) == []
