"""Ids of users: each its own place, in little memory, whatever they hold."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tracemalloc

import pytest

from prlhf.data import user_index
from prlhf.data.user_index import UserIds, UserIndex
from prlhf.errors import DataError

HOSTILE_IDS = ["Ā/../", "a\x00b", "\u202eRTL", "😀", "x" * 10_000, " ", "null", "Ａ", "a\nb", '"', "../../etc/passwd"]


@pytest.fixture(params=["in memory", "from a file"], autouse=True)
def _where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few ids are mapped from a file as many are, too."""
    if request.param == "from a file":
        monkeypatch.setattr(user_index, "LARGE_BYTES", 0)


def test_hostile_user_ids_keep_their_own_index() -> None:
    index = UserIndex(HOSTILE_IDS)
    assert [index.user_id(index.index(user)) for user in HOSTILE_IDS] == HOSTILE_IDS


def test_unknown_user_is_refused_with_the_closest_one_on_a_single_short_line() -> None:
    with pytest.raises(DataError, match="did you mean 'worker-17'"):
        UserIndex(["worker-17", "someone"]).index("worker-71")
    with pytest.raises(DataError) as caught:
        UserIndex(["a"]).index("\x1b[31m\n" * 5000)
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


@pytest.mark.parametrize("index", [0, 3, -1])
def test_generic_and_absent_indices_have_no_user_id(index: int) -> None:
    with pytest.raises(DataError, match="expected 1..2"):
        UserIndex(["a", "b"]).user_id(index)


def test_user_listed_twice_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="'b' is listed twice"):
        UserIndex(["a", "b", "c", "b"])


def test_ids_read_as_the_tuple_that_they_came_as() -> None:
    ids = UserIds(HOSTILE_IDS)
    assert ids == tuple(HOSTILE_IDS) and ids == HOSTILE_IDS and ids == UserIds(iter(HOSTILE_IDS))
    assert ids != HOSTILE_IDS[:-1] and ids != [*HOSTILE_IDS[:-1], "other"] and ids != "null"
    assert list(ids) == HOSTILE_IDS and ids[-1] == HOSTILE_IDS[-1] and ids[2:5] == tuple(HOSTILE_IDS[2:5])
    assert "null" in ids and "nul" not in ids and None not in ids
    assert not UserIds([]) and list(UserIds([])) == [] and UserIds([]).find("a") is None
    with pytest.raises(IndexError):
        ids[len(HOSTILE_IDS)]
    assert repr(UserIds(["a", "b"])) == "UserIds(['a', 'b'])"


def test_a_process_with_other_hashes_finds_the_ids_that_were_sent_to_it() -> None:
    sent = pickle.dumps(UserIndex(HOSTILE_IDS))
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).index('null'), hash('null'))"
    done = [
        subprocess.run(
            [sys.executable, "-c", script], input=sent, capture_output=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert done[0][0] == done[1][0] == b"7" and done[0][1] != done[1][1]


def test_half_a_character_is_an_id_like_others() -> None:
    """JSON can hold a lone surrogate; where it must not be, files refuse it."""
    assert UserIndex(["\ud800", "a"]).index("\ud800") == 1


def test_ids_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_index, "hash", lambda text: len(text) % 2, raising=False)
    names = [f"{i}" for i in range(120)]
    index = UserIndex(names)
    assert [index.index(name) for name in names] == list(range(1, 121))
    assert "121" not in index and "x" not in index
    with pytest.raises(DataError, match="'7' is listed twice"):
        UserIndex([*names, "7", "119"])


def traced_ids() -> tuple[UserIds, int, int]:
    """A hundred thousand ids of 32 characters, the bytes that they take, and those that they took at most."""
    tracemalloc.start()
    ids = UserIds(f"{i:032x}" for i in range(100_000))
    taken, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ids.find(f"{77_777:032x}") == 77_777
    return ids, taken, peak


def test_a_hundred_thousand_ids_take_little_more_than_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_index, "LARGE_BYTES", 2**40)
    _, taken, peak = traced_ids()
    assert taken < 100_000 * (32 + 30) and peak < 2.5 * taken


def test_from_a_file_they_take_no_memory_until_they_are_read() -> None:
    ids, taken, peak = traced_ids()
    assert taken < 10_000 and peak < 100_000 * 160
    assert len(list(ids)) == 100_000
    ids.let_go_pages()
    assert ids[99_999] == f"{99_999:032x}"


def test_without_room_for_a_file_they_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(user_index.tempfile, "TemporaryFile", full)
    assert UserIds(HOSTILE_IDS) == HOSTILE_IDS
