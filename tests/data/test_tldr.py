"""The reader of the TL;DR comparisons, on files written here in the release's format, and the paper's protocol."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prlhf.data.prepared import load_prepared
from prlhf.data.tldr import (
    Comparison,
    draw_tastes,
    judge,
    make_prompt,
    prepare_tldr,
    rank_workers,
    read_tldr,
)
from prlhf.errors import DataError

NAMES = ["ikNmucwun", "KZL1qeRzH", "ZzGCcAhvq", "p4Oh7rUGy", "qo6WIyEh2", "zKV8BFGy6", "i8YiBZlrY"]
SHORT, LONG = " sold my car, was it right?", " sold my car to my brother and he crashed it the same day. was it right?"


def record(number: int, worker: str, split: str = "train", **changes: Any) -> dict[str, Any]:
    """A line of a batch file."""
    return {
        "info": {
            "id": f"t3_{split}{number}",
            "post": f"I sold my car to my brother.\n\nThat was {split} {number} days ago.",
            "title": "Was it right?",
            "subreddit": "relationships",
        },
        "summaries": [
            {"text": LONG, "policy": "sup4_6b_t.7", "note": "Sold a car."},
            {"text": SHORT, "policy": "sup2", "note": None},
        ],
        "choice": 1,
        "worker": worker,
        "batch": "batch9",
        "split": split,
        "extra": {"confidence": 8},
        **changes,
    }


def with_policies(first: str, second: str) -> list[dict[str, Any]]:
    return [{"text": LONG, "policy": first, "note": None}, {"text": SHORT, "policy": second, "note": None}]


def write_release(folder: Path) -> Path:
    """Worker i of seven has 40 - 5 i training comparisons and two for validation, in two batches."""
    (folder / "comparisons").mkdir(parents=True)
    workers = [name for i, name in enumerate(NAMES) for _ in range(40 - 5 * i)]
    train = [record(number, worker) for number, worker in enumerate(workers)]
    valid = [record(100 * v + i, name, f"valid{v}") for v in (1, 2) for i, name in enumerate(NAMES)]
    for name, records in (("batch3", train), ("batch10", valid)):
        lines = "".join(json.dumps(each) + "\n" for each in records)
        (folder / "comparisons" / f"{name}.json").write_text(lines)
    return folder


def test_a_line_becomes_a_comparison_with_the_papers_prompt(tmp_path: Path) -> None:
    train, validation, left_out = read_tldr(write_release(tmp_path))
    assert (len(train), len(validation), left_out) == (40 + 35 + 30 + 25 + 20 + 15 + 10, 14, 0)
    assert train[0] == Comparison(
        "SUBREDDIT: r/relationships\nTITLE: Was it right?\n"
        "POST: I sold my car to my brother.\n\nThat was train 0 days ago.\nTL;DR:",
        (LONG, SHORT),
        NAMES[0],
    )


@pytest.mark.parametrize(
    ("policies", "kept"),
    [
        (("sup4", "sup2"), True), (("sup4_6b", "ref"), False), (("sup4_ppo_rm3_kl10", "sup4"), False),
        (("sup1", "cnndm_sup4"), False), (("ppo_xl", "ref"), False),
    ],
)  # fmt: skip
def test_both_policies_must_be_supervised_models_of_posts(
    tmp_path: Path, policies: tuple[str, str], kept: bool
) -> None:
    line = record(0, "w", summaries=with_policies(*policies))
    (tmp_path / "batch3.json").write_text(json.dumps(line))
    train, _, left_out = read_tldr(tmp_path)
    assert (len(train), left_out) == (int(kept), int(not kept))


def test_news_articles_have_no_subreddit(tmp_path: Path) -> None:
    info = {"id": "1", "site": "dailymail", "title": "A dog", "article": "Text.", "post": None, "subreddit": None}
    (tmp_path / "batch0_cnndm.json").write_text(json.dumps(record(0, "w", "valid2", info=info)))
    _, (comparison,), _ = read_tldr(tmp_path)
    assert comparison.prompt == "TITLE: A dog\nPOST: Text.\nTL;DR:"


def test_the_legacy_draw_makes_workers_4_5_and_6_prefer_the_shorter_summary() -> None:
    """method.md, section 4: of the ten most active; the same from one vectorised draw of the legacy generator."""
    tastes = draw_tastes([str(rank) for rank in range(1, 41)], np.random.RandomState(3456))
    assert [rank for rank in range(1, 11) if not tastes[str(rank)]] == [4, 5, 6]
    at_once = np.random.RandomState(3456).choice([0, 1], size=40, p=[0.7, 0.3])
    assert [not longer for longer in tastes.values()] == list(at_once == 1)


def test_workers_are_ranked_by_training_comparisons_alone() -> None:
    def comparisons(*workers: str) -> list[Comparison]:
        return [Comparison("p", ("a", "b"), worker) for worker in workers]

    ranked = rank_workers(comparisons("b", "c", "c", "a"), comparisons("a", "a", "a", "d", "0"))
    assert ranked == ["c", "a", "b", "0", "d"], "ties by id; who judged validation rows only comes last"


@pytest.mark.parametrize(
    ("summaries", "longer", "shorter"),
    [(("abc", "ab"), "abc", "ab"), (("ab", "abc"), "abc", "ab"), (("ab", "cd"), "ab", "ab")],
)
def test_labels_go_by_characters_and_equal_lengths_to_the_first(
    summaries: tuple[str, str], longer: str, shorter: str
) -> None:
    comparison = Comparison("p", summaries, "w")
    rows = {prefers: judge(comparison, prefers_longer=prefers) for prefers in (True, False)}
    assert (rows[True].chosen, rows[False].chosen) == (longer, shorter)
    assert all({row.chosen, row.rejected} == set(summaries) for row in rows.values())
    assert rows[True].pair_id == rows[False].pair_id


def test_preparing_takes_the_most_active_workers_and_splits_validation_into_seen_and_unseen(tmp_path: Path) -> None:
    """Ranks 4, 5 and 6 of the seven prefer the shorter summary; 4 users: one minority, the unseen two of three."""
    raw = write_release(tmp_path / "raw")
    summary = prepare_tldr(raw, tmp_path / "out", seed=1, max_users=4)
    data = load_prepared(tmp_path / "out")
    assert data.user_ids() == NAMES[:4]
    assert Counter(row.user_id for row in data.train + data.dev) == {NAMES[i]: 40 - 5 * i for i in range(4)}
    assert len(data.dev) == round(0.05 * 130)
    assert Counter(row.user_id for row in data.eval_seen) == dict.fromkeys(NAMES[:4], 2)
    assert Counter(row.user_id for row in data.eval_unseen) == dict.fromkeys(NAMES[4:], 2)
    for row in data.train + data.eval_seen + data.eval_unseen:
        prefers_longer = row.user_id not in NAMES[3:6]
        assert row.chosen == (LONG if prefers_longer else SHORT).strip()
    assert summary.left_out["worker_not_among_users"] == 20 + 15 + 10


def test_a_validation_comparison_of_a_training_post_is_left_out(tmp_path: Path) -> None:
    records = [record(number, "w") for number in range(3)]
    records.append({**records[0], "worker": "v", "split": "valid1"})
    (tmp_path / "batch3.json").write_text("".join(json.dumps(each) + "\n" for each in records))
    summary = prepare_tldr(tmp_path, tmp_path / "out", seed=1)
    assert summary.num_rows["eval_unseen"] == 0 and summary.left_out["validation_on_training_post"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"info": None}, "batch3.json:1: info is None, expected an object"),
        ({"summaries": [{"text": "a", "policy": "sup1"}]}, "batch3.json:1: summaries is .*, expected two objects"),
        ({"summaries": [{"text": "a"}, {"text": "b"}]}, "batch3.json:1: policy is None, expected a string"),
        ({"split": "test"}, "batch3.json:1: split is 'test', expected one of train, valid1, valid2"),
        ({"worker": 3}, "batch3.json:1: worker is 3, expected a string"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "batch3.json").write_text(json.dumps({**record(0, "w"), **changes}))
    with pytest.raises(DataError, match=message):
        read_tldr(tmp_path)


def test_missing_files_and_useless_limits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no .json or .parquet files"):
        read_tldr(tmp_path)
    raw = write_release(tmp_path / "raw")
    with pytest.raises(DataError, match="a limit of 1 or more"):
        prepare_tldr(raw, tmp_path / "out", seed=1, max_users=0)


def test_parquet_without_pyarrow_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"of-00001.parquet: needs pyarrow, which is not installed; `pip install"):
        read_tldr(tmp_path)


def test_the_hubs_parquet_export_reads_like_the_release(tmp_path: Path) -> None:
    """The export has the same nested columns."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = write_release(tmp_path / "raw")
    lines = [line for path in sorted((raw / "comparisons").iterdir()) for line in path.read_text().splitlines()]
    (tmp_path / "hub" / "comparisons").mkdir(parents=True)
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
    parquet.write_table(table, tmp_path / "hub" / "comparisons" / "0000.parquet")
    assert read_tldr(tmp_path / "hub") == read_tldr(raw)
    (tmp_path / "hub" / "comparisons" / "0000.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(DataError, match="0000.parquet: not readable as parquet"):
        read_tldr(tmp_path / "hub")


def test_a_prompt_names_what_there_is() -> None:
    assert make_prompt("T", "P") == "TITLE: T\nPOST: P\nTL;DR:"
