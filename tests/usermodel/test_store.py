"""The user store keeps what it acknowledged, refuses what is damaged, and forgets without a trace."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prlhf.errors import CheckpointError, DataError, RunDirError
from prlhf.usermodel.store import INDEX, RowField, UserStore

ROW = {"row": RowField((4,), torch.float32)}
SMALL_SHARDS = 5 * (4 * 4 + 4)  # five rows, each with its checksum
HOSTILE_IDS = [
    "", "\0", "a\0b", "../../etc/passwd", "Ā/../", "\u202egnp.exe", "👩‍👩‍👧",
    "x" * 10_000, "rows-000000.bin", "'; --",
]


def rows_of(*values: float) -> torch.Tensor:
    """Row i is four times values[i]."""
    return torch.tensor(values, dtype=torch.float32)[:, None].repeat(1, 4)


def make_store(directory: Path, num_users: int = 12) -> UserStore:
    """Users "u0".. whose rows are 0, 1, ..; five rows a shard."""
    store = UserStore.create(directory, ROW, shard_bytes=SMALL_SHARDS)
    store.put([f"u{i}" for i in range(num_users)], rows_of(*range(num_users)))
    return store


def files_holding(directory: Path, content: bytes) -> list[str]:
    return [path.name for path in directory.iterdir() if content in path.read_bytes()]


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@settings(max_examples=8, deadline=None)
@given(
    puts=st.lists(
        st.dictionaries(st.text(max_size=5), st.floats(width=32, allow_nan=False), min_size=1, max_size=8), max_size=4
    ),
    reopen=st.booleans(),
)
def test_the_last_put_of_each_user_is_read(
    tmp_path_factory: pytest.TempPathFactory, puts: list[dict[str, float]], reopen: bool
) -> None:
    directory = tmp_path_factory.mktemp("store") / "users"
    store, expected = UserStore.create(directory, ROW, shard_bytes=SMALL_SHARDS), {}
    for values in puts:
        store.put(list(values), rows_of(*values.values()))
        expected |= values
        if reopen:
            store.close()
            store = UserStore.open(directory, write=True)
    with store:
        assert list(store) == sorted(expected, key=str.encode)
        assert len(store) == len(expected)
        assert torch.equal(store.read(list(expected)), rows_of(*expected.values()).view(-1, 4))
        assert store.find_damage() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_rows_of_any_shape_and_type_come_back_bit_for_bit(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rows = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    with UserStore.create(tmp_path / "users", {"row": RowField(shape, dtype)}, shard_bytes=64) as store:
        store.put([str(i) for i in range(7)], rows)
    with UserStore.open(tmp_path / "users") as store:
        read = store.read([str(i) for i in range(7)])
    assert read.dtype == dtype and torch.equal(read, rows)


def test_moments_stand_beside_their_row_and_are_zero_until_given(tmp_path: Path) -> None:
    fields = {**ROW, "exp_avg": RowField((4,), torch.float32), "step": RowField((), torch.int32)}
    with UserStore.create(tmp_path / "users", fields) as store:
        store.put(["a"], rows_of(1), exp_avg=rows_of(2), step=torch.tensor([3], dtype=torch.int32))
        store.put(["b"], rows_of(4))
        assert torch.equal(store.read(["b", "a"], "exp_avg"), rows_of(0, 2))
        assert store.read(["b", "a"], "step").tolist() == [0, 3]
        with pytest.raises(ValueError, match="exp_avg_sq: no field of this store"):
            store.put(["a"], rows_of(1), exp_avg_sq=rows_of(2))
        with pytest.raises(ValueError, match=r"row: got \(1, 4\) torch.float64, expected \(1, 4\) torch.float32"):
            store.put(["a"], rows_of(1).double())


def test_hostile_ids_come_back_exactly_and_name_no_file(tmp_path: Path) -> None:
    with UserStore.create(tmp_path / "users", ROW) as store:
        store.put(HOSTILE_IDS, rows_of(*range(len(HOSTILE_IDS))))
    with UserStore.open(tmp_path / "users") as store:
        assert set(store) == set(HOSTILE_IDS)
        assert torch.equal(store.read(HOSTILE_IDS), rows_of(*range(len(HOSTILE_IDS))))
        with pytest.raises(DataError, match="half a character"):
            store.read(["\ud800"])
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert names == {"users", "users/.lock", f"users/{INDEX}", "users/tail-000000.bin"}


def test_unknown_users_and_users_given_twice_are_refused(tmp_path: Path) -> None:
    with make_store(tmp_path / "users") as store:
        assert "u3" in store and "nobody" not in store
        with pytest.raises(DataError, match="no row of user 'nobody'"):
            store.read(["u3", "nobody"])
        with pytest.raises(DataError, match="a user twice"):
            store.put(["v", "v"], rows_of(1, 2))
        assert "v" not in store and store.read([]).shape == (0, 4)


def append_for_ever(directory: Path, batch: int, acknowledged: Any) -> None:
    store = UserStore.open(directory, write=True)
    while True:
        store.put(["last", *(f"{batch}-{i}" for i in range(7))], rows_of(*[batch] * 8))
        acknowledged.value = batch
        batch += 1


def test_kill_9_while_appending_loses_nothing_acknowledged(tmp_path: Path) -> None:
    UserStore.create(tmp_path / "users", ROW, shard_bytes=SMALL_SHARDS).close()
    fork, moments, last = multiprocessing.get_context("fork"), random.Random(0), -1
    for _ in range(8):
        acknowledged = fork.Value("q", last, lock=False)
        writer = fork.Process(target=append_for_ever, args=(tmp_path / "users", last + 1, acknowledged))
        writer.start()
        time.sleep(moments.uniform(0.05, 0.25))
        writer.kill()
        writer.join()
        with UserStore.open(tmp_path / "users", write=True) as store:
            found = int(store.read(["last"])[0, 0]) if "last" in store else -1
            assert found in (acknowledged.value, acknowledged.value + 1)  # killed between commit and acknowledgement
            last = found
            ids = [f"{batch}-{i}" for batch in range(last + 1) for i in range(7)]
            assert len(store) == len(ids) + (last >= 0)
            assert torch.equal(store.read(ids)[:, 0], torch.arange(last + 1.0).repeat_interleave(7))
            assert store.find_damage() == []
    assert last > 8


def test_a_write_that_was_never_committed_is_overwritten(tmp_path: Path) -> None:
    make_store(tmp_path / "users").close()
    with (tmp_path / "users/tail-000002.bin").open("ab") as file:
        file.write(b"torn" * 10)
    (tmp_path / "users/tail-000003.bin").write_bytes(b"never committed")
    with UserStore.open(tmp_path / "users", write=True) as store:
        assert not (tmp_path / "users/tail-000003.bin").exists()
        store.put(["later"], rows_of(99))
        assert torch.equal(store.read(["later", "u11"]), rows_of(99, 11))
        assert store.find_damage() == []


def test_a_shard_that_lost_its_end_is_refused_at_opening(tmp_path: Path) -> None:
    make_store(tmp_path / "users").close()
    tail = tmp_path / "users/tail-000002.bin"
    tail.write_bytes(tail.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="tail-000002.bin: 39 bytes, expected 40; use another checkpoint"):
        UserStore.open(tmp_path / "users")
    tail.unlink()
    with pytest.raises(CheckpointError, match="tail-000002.bin: missing"):
        UserStore.open(tmp_path / "users")


@pytest.mark.parametrize("name", ["rows-000000-*", "tail-000002.bin"])
def test_a_flipped_byte_is_refused_when_it_is_read(tmp_path: Path, name: str) -> None:
    make_store(tmp_path / "users").close()
    (path,) = (tmp_path / "users").glob(name)
    flip_byte(path, 0)
    damaged, whole = ("u0", "u1") if name.startswith("rows") else ("u10", "u11")
    with UserStore.open(tmp_path / "users") as store:
        assert store.read([whole])[0, 0] == float(whole[1:])
        with pytest.raises(CheckpointError, match=f"row of user '{damaged}': damaged") as error:
            store.read([whole, damaged])
        assert len(str(error.value).splitlines()) == 1
        assert any(path.name in line for line in store.find_damage())


def test_an_index_that_is_no_index_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "users").close()
    index = tmp_path / "users" / INDEX
    for content in (b"not SQLite" * 1000, b""):
        index.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{INDEX}: damaged"):
            UserStore.open(tmp_path / "users")
    index.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        UserStore.open(tmp_path / "users")


def test_another_users_row_does_not_pass_for_ones_own(tmp_path: Path) -> None:
    make_store(tmp_path / "users").close()
    db = sqlite3.connect(tmp_path / "users" / INDEX)
    db.execute("UPDATE users SET slot = 4 WHERE id = ?", (b"u3",))
    db.commit()
    db.close()
    with UserStore.open(tmp_path / "users") as store, pytest.raises(CheckpointError, match="user 'u3': damaged"):
        store.read(["u3"])


def refusal(directory: Path, told: Any) -> None:
    try:
        UserStore.open(directory, write=True)
    except RunDirError as error:
        told.put(str(error))


def test_a_second_writer_is_refused_and_readers_see_each_commit(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    with make_store(tmp_path / "users") as store:
        told = fork.Queue()
        fork.Process(target=refusal, args=(tmp_path / "users", told)).start()
        assert f"being written by process {os.getpid()} on " in told.get(timeout=10)
        with UserStore.open(tmp_path / "users") as reader:
            with pytest.raises(RunDirError, match="open for reading"):
                reader.put(["v"], rows_of(1))
            store.put([f"v{i}" for i in range(9)], rows_of(*range(9)))  # fills the tail that the reader knows
            assert torch.equal(reader.read(["v0", "v8", "u11"]), rows_of(0, 8, 11))
            store.forget("v0")
            assert "v0" not in reader and torch.equal(reader.read(["v1"]), rows_of(1))
    with pytest.raises(RunDirError, match="holds a user store already"):
        UserStore.create(tmp_path / "users", ROW)


def test_a_new_store_can_take_over_who_was_forgotten(tmp_path: Path) -> None:
    with make_store(tmp_path / "users") as store:
        store.put(["u1"], rows_of(1))
        store.forget("u3")
        assert len(store) == 11 and store.num_slots == 13
        with UserStore.create(tmp_path / "fresh", ROW, forgotten=store) as fresh:
            assert fresh.is_forgotten("u3") and not fresh.is_forgotten("u4") and fresh.num_slots == 0
            with pytest.raises(DataError, match="was forgotten"):
                fresh.put(["u3"], rows_of(3))


@pytest.mark.parametrize("user_id", ["canary-7f3a9c", "canary" * 2000])
def test_a_forgotten_user_leaves_neither_id_nor_row_in_any_file(tmp_path: Path, user_id: str) -> None:
    old, new = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([[0.5, 0.6, 0.7, 0.8]])
    with make_store(tmp_path / "users") as store:
        store.put([user_id], old)
        store.put([f"v{i}" for i in range(9)], rows_of(*range(9)))
        store.put([user_id], new)
        store.link_into(tmp_path / "linked")
        assert store.forget(user_id) == 2
        assert user_id not in store and store.is_forgotten(user_id) and len(store) == 21
        assert store.find_damage() == []
        with pytest.raises(DataError, match="was forgotten"):
            store.put([user_id], new)
        assert store.forget(user_id) == 0
        assert torch.equal(store.read(["u11", "v8"]), rows_of(11, 8))
    for row in (old, new):
        assert files_holding(tmp_path / "users", row.numpy().tobytes()[4:]) == []
    assert files_holding(tmp_path / "users", user_id.encode()[:12]) == []
    with UserStore.open(tmp_path / "linked", write=True) as linked:
        assert linked.forget(user_id) == 2 and linked.find_damage() == []
    for content in (old.numpy().tobytes(), new.numpy().tobytes(), user_id.encode()[:12]):
        assert files_holding(tmp_path / "linked", content) == []


def test_ids_forgotten_among_many_leave_nothing_in_the_index(tmp_path: Path) -> None:
    order = random.Random(0)
    ids = [f"{order.getrandbits(128):032x}" for _ in range(6000)]
    with UserStore.create(tmp_path / "users", ROW) as store:
        for start in range(0, 6000, 1500):
            store.put(ids[start : start + 1500], torch.zeros(1500, 4))
        for user_id in order.sample(ids, 40):
            store.forget(user_id)
            assert user_id.encode() not in (tmp_path / "users" / INDEX).read_bytes()


def test_a_forget_that_was_cut_short_is_completed_by_the_next_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_store(tmp_path / "users") as store:
        monkeypatch.setattr(store, "_finish_erasures", lambda: None)
        store.forget("u3")
    row = rows_of(3).numpy().tobytes()
    assert files_holding(tmp_path / "users", row) != []
    with UserStore.open(tmp_path / "users", write=True) as store:
        assert files_holding(tmp_path / "users", row) == []
        assert store.find_damage() == [] and "u3" not in store


def test_a_linked_store_shares_full_shards_and_stays_as_it_was(tmp_path: Path) -> None:
    with make_store(tmp_path / "users") as store:
        files = store.link_into(tmp_path / "linked")
        store.put(["u0", "v"], rows_of(100, 101))
    for name, (size, digest) in files.items():
        content = (tmp_path / "linked" / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, digest)
        is_shared = (tmp_path / "linked" / name).samefile(tmp_path / "users" / name)
        assert is_shared == name.startswith("rows-")
    assert sorted(files) == sorted(path.name for path in (tmp_path / "linked").iterdir())
    with UserStore.open(tmp_path / "linked", write=True) as linked:
        assert len(linked) == 12 and torch.equal(linked.read(["u0"]), rows_of(0))
        linked.put(["w"], rows_of(102))
        assert linked.find_damage() == []
    with UserStore.open(tmp_path / "users") as store:
        assert "w" not in store and torch.equal(store.read(["u0", "v"]), rows_of(100, 101))
        assert store.find_damage() == []


def test_users_that_were_never_put_take_no_space(tmp_path: Path) -> None:
    with make_store(tmp_path / "users") as store:
        files = store.link_into(tmp_path / "linked")
    assert sum(size for name, (size, _) in files.items() if name != INDEX) == 12 * (4 * 4 + 4)
