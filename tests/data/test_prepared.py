"""The prepared directory: written whole or not at all, and checked when it is loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from prlhf.data import prepared
from prlhf.data.prepared import check_writable, load_prepared, write_prepared
from prlhf.data.records import Message, PreferenceData, PreferenceRow, make_pair_id, record_from_row
from prlhf.data.world.psoups import build_psoups
from prlhf.errors import DataError, RunDirError
from prlhf.files import lock_beside
from tests.forget_run import killed_at
from tests.tiny_run import Crash

HOSTILE_IDS = ["Ā/../", "a\x00b", "\u202eRTL", "😀\u2028", "x" * 10_000, "../../etc/passwd", "a\nb", '"]}']


def row(prompt: str, user: str = "u", chosen: str = "good", rejected: str = "bad", **fields: str) -> PreferenceRow:
    pair_id = fields.pop("pair_id", make_pair_id(prompt, chosen, rejected))
    return PreferenceRow(pair_id, user, prompt, chosen, rejected, **fields)


def data(**splits: list[PreferenceRow]) -> PreferenceData:
    empty = {"train": [row("t")], "dev": [], "eval_seen": [], "eval_unseen": []}
    return PreferenceData(**{**empty, **splits}, source="test")


def write_raw(directory: Path, **splits: list[PreferenceRow]) -> Path:
    """Files as another program would write them, with nothing checked."""
    directory.mkdir()
    for name, rows in {"train": [row("t")], **splits}.items():
        lines = [json.dumps(record_from_row(entry)) for entry in rows]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    return directory


def test_hostile_user_ids_and_conversations_come_back_as_they_were(tmp_path: Path) -> None:
    train = [row(f"p{number}", user) for number, user in enumerate(HOSTILE_IDS)]
    conversation = (Message("user", "é\ud7ff"), Message("assistant", ""))
    train.append(PreferenceRow("m", "\u202eRTL", conversation, "c", "r", "text"))
    original = data(train=train, dev=[row("d", "\u202eRTL")], eval_unseen=[row("e", "new")])
    summary = write_prepared(tmp_path / "out", original)
    loaded = load_prepared(tmp_path / "out")
    assert replace(loaded, source="test") == original
    assert loaded.user_ids() == HOSTILE_IDS
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "dev.jsonl", "eval_seen.jsonl", "eval_unseen.jsonl", "out", "train.jsonl"
    ]
    rows = "train 9, dev 1, eval_seen 0, eval_unseen 1"
    assert str(summary) == f"{tmp_path / 'out'}: rows: {rows}; users in training: 8; left out: nothing"


def test_declared_users_come_back_in_their_order(tmp_path: Path) -> None:
    original = replace(data(eval_unseen=[row("e", "z")]), declared_users=("b", "u", "a"))
    write_prepared(tmp_path / "out", original)
    assert load_prepared(tmp_path / "out").user_ids() == ["b", "u", "a"]


def test_wishes_come_back(tmp_path: Path) -> None:
    built = build_psoups(seed=1)
    write_prepared(tmp_path / "out", built)
    data = load_prepared(tmp_path / "out")
    assert data.preferences == built.preferences and data.preferences["P2A"] == "Keep it short."
    assert data.user_ids() == built.user_ids()


def test_rows_of_a_built_in_world_keep_their_origin_and_their_ceiling(tmp_path: Path) -> None:
    built = replace(data(), source="builtin:prism", ceiling=0.9)
    write_prepared(tmp_path / "out", built)
    assert json.loads((tmp_path / "out" / "origin.json").read_text()) == {"source": "builtin:prism", "ceiling": 0.9}
    loaded = load_prepared(tmp_path / "out")
    assert (loaded.source, loaded.world, loaded.ceiling) == (str(tmp_path / "out"), "builtin:prism", 0.9)
    write_prepared(tmp_path / "again", loaded)
    assert load_prepared(tmp_path / "again").world == "builtin:prism"
    write_prepared(tmp_path / "out", data(), force=True)
    assert load_prepared(tmp_path / "out").world is None, "of rows from elsewhere nothing is written"


@pytest.mark.parametrize("origin", [{}, {"source": 3}, {"source": "builtin:prism", "ceiling": "high"},
                                    {"source": "builtin:prism", "ceiling": 90}, {"source": "a", "ceiling": True}])
def test_an_origin_that_is_none_is_refused(tmp_path: Path, origin: dict) -> None:
    raw = write_raw(tmp_path / "raw")
    (raw / "origin.json").write_text(json.dumps(origin))
    with pytest.raises(DataError, match=r"origin.json: .*expected .*; mend it, or remove it"):
        load_prepared(raw)


def test_a_directory_that_holds_something_is_refused_and_force_replaces_prepared_data_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_prepared(out, data(train=[row("old")]))
    with pytest.raises(DataError, match="already holds prepared data.*--force"):
        write_prepared(out, data(train=[row("new")]))
    assert load_prepared(out).train == [row("old")]
    write_prepared(out, data(train=[row("new")]), force=True)
    assert load_prepared(out).train == [row("new")]
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        write_prepared(out, data(), force=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        write_prepared(tmp_path / "file", data(), force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_failed_write_leaves_what_was_there_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    out = tmp_path / "out"
    if force:
        write_prepared(out, data(train=[row("old")]))
    written: list[Path] = []

    def full_disk(path: Path, records: object) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.write_text("half")

    monkeypatch.setattr(prepared, "write_jsonl", full_disk)
    with pytest.raises(DataError, match="cannot be written .No space left on device"):
        write_prepared(out, data(train=[row("new")]), force=force)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if force else [])
    if force:
        assert load_prepared(out).train == [row("old")]


def test_a_failed_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_prepared(out, data(train=[row("old")]))
    rename = Path.rename

    def fails_for_the_new_one(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(DataError, match="Input/output error"):
        write_prepared(out, data(train=[row("new")]), force=True)
    assert load_prepared(out).train == [row("old")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_at_any_moment_the_next_call_finds_the_old_or_the_new_directory_and_no_rubbish(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_prepared(out, data(train=[row("old")]))
    with killed_at(10**6) as count:
        write_prepared(out, data(train=[row("new")]), force=True)
    num_points, away = count[0], 0
    for point in range(num_points):
        shutil.rmtree(out)
        write_prepared(out, data(train=[row("old")]))
        with pytest.raises(Crash), killed_at(point):
            write_prepared(out, data(train=[row("new")]), force=True)
        away += not out.exists()
        with pytest.raises(DataError, match="already holds prepared data"):
            write_prepared(out, data(train=[row("other")]))
        assert load_prepared(out).train in ([row("old")], [row("new")])
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert away > 0


def test_before_any_work_what_a_killed_process_left_is_put_back_or_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_prepared(out, data(train=[row("old")]))
    out.rename(tmp_path / ".out.old-1")
    (tmp_path / ".out.tmp-1").mkdir()
    with lock_beside(out), pytest.raises(RunDirError, match="in use by process"):
        check_writable(out, force=True)
    check_writable(out, force=True)
    assert load_prepared(out).train == [row("old")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("held_out", ["dev", "eval_seen", "eval_unseen"])
def test_the_same_pair_in_training_and_held_out_data_is_an_error_naming_both(tmp_path: Path, held_out: str) -> None:
    user = "new" if held_out == "eval_unseen" else "u"
    swapped = row("t", user, chosen="bad", rejected="good", pair_id="another id")
    raw = write_raw(tmp_path / "raw", **{held_out: [row("fine", user), swapped]})
    with pytest.raises(DataError) as caught:
        load_prepared(raw)
    assert f"{raw / held_out}.jsonl:2: the same prompt and responses as {raw / 'train.jsonl'}:1" in str(caught.value)


def test_seen_and_unseen_users_may_be_evaluated_on_the_same_pair(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", eval_seen=[row("e")], eval_unseen=[row("e", "new")])
    assert len(load_prepared(raw).eval_unseen) == 1


def test_a_pair_id_for_two_different_pairs_is_an_error_naming_both(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", train=[row("t", pair_id="7"), row("t", "v", "bad", "good", pair_id="7")],
                    eval_seen=[row("e", pair_id="7")])
    with pytest.raises(DataError) as caught:
        load_prepared(raw)
    assert len(caught.value.messages) == 1
    expected = f"eval_seen.jsonl:1: pair_id '7' names another prompt or other responses than at {raw}/train.jsonl:1;"
    assert expected in str(caught.value)


def test_many_conflicts_are_cut_short(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", train=[row(f"t{number}", pair_id="7") for number in range(50)])
    with pytest.raises(DataError) as caught:
        load_prepared(raw)
    assert len(caught.value.messages) == 11 and caught.value.messages[-1] == "and 39 more like these"


def test_unusable_and_repeated_rows_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = [row("t"), row("t"), row("x", rejected=""), row("y", chosen="s", rejected="s"), row(""), row("t", "v")]
    with caplog.at_level("WARNING"):
        loaded = load_prepared(write_raw(tmp_path / "raw", train=train))
    assert loaded.train == [row("t"), row("t", "v")]
    assert "{'duplicate': 1, 'empty_response': 1, 'equal_responses': 1, 'empty_prompt': 1}" in caplog.text
    both_ways = [row("t"), row("t", chosen="bad", rejected="good")]
    assert load_prepared(write_raw(tmp_path / "both", train=both_ways)).train == both_ways


def test_users_json_orders_the_users_and_gives_their_texts(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", train=[row("t", "b"), row("s", "a")], eval_unseen=[row("e", "c")])
    users = {
        "a": {"user_text": "A.", "split": "seen"}, "b": {"split": "seen"}, "c": {"user_text": "C.", "split": "unseen"}
    }
    (raw / "users.json").write_text(json.dumps(users))
    loaded = load_prepared(raw)
    assert loaded.user_ids() == ["a", "b"]
    assert [entry.user_text for entry in (*loaded.train, *loaded.eval_unseen)] == ["", "A.", "C."]


def test_a_text_that_all_rows_of_a_user_share_is_written_once_and_read_back_into_each(tmp_path: Path) -> None:
    data = PreferenceData(
        train=[replace(row("t", "b"), user_text="B."), replace(row("s", "b"), user_text="B."), row("s", "a"),
               replace(row("t", "m"), user_text="One."), replace(row("s", "m"), user_text="Two.")],
        dev=[],
        eval_seen=[],
        eval_unseen=[replace(row("e", "c"), user_text="C.")],
        source="made here",
        declared_users=("b", "a", "m"),
    )
    write_prepared(tmp_path / "out", data)
    assert json.loads((tmp_path / "out" / "users.json").read_text()) == {
        "b": {"user_text": "B.", "split": "seen"}, "a": {"split": "seen"}, "m": {"split": "seen"},
        "c": {"user_text": "C.", "split": "unseen"},
    }
    assert "B." not in (tmp_path / "out" / "train.jsonl").read_text()
    loaded = load_prepared(tmp_path / "out")
    assert loaded.train == data.train and loaded.eval_unseen == data.eval_unseen


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ({"a": {"split": "seen"}}, "train.jsonl:1: user 'u' is not in users.json"),
        ({"u": {"split": "unseen"}, "n": {"split": "unseen"}}, "train.jsonl:1: user 'u' is not a seen user"),
        ({"u": {"split": "seen"}, "n": {"split": "seen"}}, "eval_unseen.jsonl:1: user 'n' is a seen user"),
        ({"u": {"split": "old"}}, "users.json: user 'u'"),
        ({"u": {"split": "seen"}, "all": {"split": "seen"}}, "users.json: user 'all': names all users"),
        ({"u": "text"}, "users.json: user 'u'"),
        ({"u": {"split": "seen", "preference": 3}}, "users.json: user 'u': preference is 3, expected a string"),
        ({"u": {"split": "seen", "user_text": 5}, "n": {"split": "unseen"}}, "user_text is 5"),
        ({"u": {"split": "seen", "user_text": "other"}, "n": {"split": "unseen"}}, "user_text differs"),
    ],
)
def test_users_json_that_contradicts_the_rows_is_refused(tmp_path: Path, users: dict, message: str) -> None:
    raw = write_raw(tmp_path / "raw", train=[row("t", user_text="mine")], eval_unseen=[row("e", "n")])
    (raw / "users.json").write_text(json.dumps(users))
    with pytest.raises(DataError) as caught:
        load_prepared(raw)
    assert message in str(caught.value)


def test_users_on_the_wrong_side_are_refused_without_users_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="eval_unseen.jsonl:1: user 'u' is a seen user"):
        load_prepared(write_raw(tmp_path / "a", eval_unseen=[row("e")]))
    with pytest.raises(DataError, match="eval_seen.jsonl:1: user 'n' is not a seen user"):
        load_prepared(write_raw(tmp_path / "b", eval_seen=[row("e", "n")]))


def test_a_directory_without_training_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no train.jsonl"):
        load_prepared(tmp_path)
    with pytest.raises(DataError, match="train.jsonl: no usable rows"):
        load_prepared(write_raw(tmp_path / "raw", train=[]))
