"""Summaries of posts, judged by workers who look at length alone: the reader of the TL;DR comparisons and its protocol.

Source: Stiennon et al. 2020, arXiv:2009.01325 (openai/summarize_from_feedback); the tastes as in the synthetic length
experiment of Li et al. 2024, arXiv:2402.05133.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.data.clean import clean_rows
from prlhf.data.jsonl import read_rows
from prlhf.data.prepared import PreparedSummary, check_writable, write_prepared
from prlhf.data.quoting import quote
from prlhf.data.records import PreferenceData, PreferenceRow, make_pair_id
from prlhf.data.splits import DEV_SHARE, draw, prompt_group
from prlhf.errors import DataError

TASTE_SEED = 3456
SHORTER_SHARE = 0.3
MAX_USERS = 10
WISHES = {False: "Keep the summary short.", True: "Write a long summary with all the details."}  # by prefers_longer
VALIDATION_SPLITS = {"train": False, "valid1": True, "valid2": True}


@dataclass(frozen=True)
class Comparison:
    """Two summaries of a post that a worker compared; which one was chosen plays no part in the experiment."""

    prompt: str
    summaries: tuple[str, str]
    worker: str


@dataclass(frozen=True)
class _Labelled:
    """A comparison as released: its split, and whether both summaries are of supervised policies."""

    comparison: Comparison
    validation: bool
    supervised: bool


def prepare_tldr(
    raw: Path, out: Path, *, seed: int, max_users: int = MAX_USERS, force: bool = False
) -> PreparedSummary:
    """Read the comparisons and write a prepared directory with one user a worker, most active first.

    Args:
        raw: the release, its folder `comparisons`, or the hub's parquet export of it.
        seed: draws the training posts that are dev; the tastes follow the paper's seed.
        max_users: the workers with the most training comparisons are the users; the paper takes 10 or 40.
    Raises: DataError: no or malformed files, parquet without pyarrow, no worker left, or `out` is not empty.
    """
    check_writable(out, force=force)
    train, validation, num_other_policies = read_tldr(raw)
    ranked = rank_workers(train, validation)
    active = {comparison.worker for comparison in train}
    users = [worker for worker in ranked[: max(0, max_users)] if worker in active]
    if not users:
        raise DataError(f"{raw}: no worker has a training comparison among the {max_users} most active; "
                        "give all batches of the release, and a limit of 1 or more")
    tastes = draw_tastes(ranked, np.random.RandomState(TASTE_SEED))
    data, left_out = make_preferences(train, validation, tastes, users=users, seed=seed, source=str(raw))
    left_out["policy_not_supervised"] = num_other_policies
    return write_prepared(out, data, force=force, left_out=left_out)


def read_tldr(raw: Path) -> tuple[list[Comparison], list[Comparison], int]:
    """(train, validation, comparisons left out): those whose two policies are supervised models of posts.

    As the authors of P-RLHF filter them: both names contain "sup", neither contains "ppo" or "cnn". They count 38,487
    and 16,294 comparisons.

    Raises: DataError: no or malformed files, or parquet without pyarrow.
    """
    folder = raw / "comparisons" if (raw / "comparisons").is_dir() else raw
    files = sorted(path for pattern in ("*.json", "*.jsonl", "*.jsonl.gz") for path in folder.glob(pattern))
    if files:
        labelled = [each for path in files for _, each in read_rows(path, _labelled)]
    else:
        tables = sorted(folder.rglob("*.parquet"))
        if not tables:
            raise DataError(f"{folder}: no .json or .parquet files; give the folder with the batches of comparisons")
        labelled = [each for path in tables for each in _read_parquet(path)]
    kept = [each for each in labelled if each.supervised]
    return (
        [each.comparison for each in kept if not each.validation],
        [each.comparison for each in kept if each.validation],
        len(labelled) - len(kept),
    )


def make_prompt(title: str, post: str, subreddit: str | None = None) -> str:
    """A post as the prompt that a summary answers."""
    heading = f"SUBREDDIT: r/{subreddit}\n" if subreddit else ""
    return f"{heading}TITLE: {title}\nPOST: {post}\nTL;DR:"


def rank_workers(train: Sequence[Comparison], validation: Sequence[Comparison]) -> list[str]:
    """All workers by their number of training comparisons, most first, ties by id."""
    counts = Counter(comparison.worker for comparison in train)
    workers = {comparison.worker for comparison in (*train, *validation)}
    return sorted(workers, key=lambda worker: (-counts[worker], worker))


def draw_tastes(workers: Sequence[str], generator: np.random.RandomState) -> dict[str, bool]:
    """Whether each worker prefers the longer summary: one draw each, in the order given."""
    return {worker: bool(generator.choice([True, False], p=[1 - SHORTER_SHARE, SHORTER_SHARE])) for worker in workers}


def length_tastes(preferences: Mapping[str, str]) -> dict[str, bool]:
    """Whether a user prefers the longer text, of those whose wish is one of this experiment's."""
    tastes = {wish: longer for longer, wish in WISHES.items()}
    return {user: tastes[wish] for user, wish in preferences.items() if wish in tastes}


def judge(comparison: Comparison, *, prefers_longer: bool) -> PreferenceRow:
    """The row of a worker with this taste. Lengths are in characters; of equally long summaries the first is chosen."""
    first, second = comparison.summaries
    gap = len(first) - len(second)
    chosen, rejected = (first, second) if gap == 0 or (gap > 0) == prefers_longer else (second, first)
    chosen, rejected = chosen.strip(), rejected.strip()
    pair_id = make_pair_id(comparison.prompt, chosen, rejected)
    return PreferenceRow(pair_id, comparison.worker, comparison.prompt, chosen, rejected)


def make_preferences(
    train: Sequence[Comparison],
    validation: Sequence[Comparison],
    tastes: Mapping[str, bool],
    *,
    users: Sequence[str],
    seed: int,
    source: str,
) -> tuple[PreferenceData, dict[str, int]]:
    """Training rows of the chosen workers; validation rows of theirs and, as unseen users, of all others.

    Args:
        tastes: whether a worker prefers the longer summary.
        users: the workers to train on, most active first.
        seed: draws the 5% of the training posts that are dev.
    Returns: (data, reason -> number of comparisons left out).
    """
    known = set(users)
    trained = [each for each in train if each.worker in known]
    (rows, dropped), (held_out, dropped_held_out) = (
        clean_rows([judge(each, prefers_longer=tastes[each.worker]) for each in part]) for part in (trained, validation)
    )
    posts = dict.fromkeys(map(prompt_group, rows))
    dev_posts = draw(list(posts), DEV_SHARE, seed=[seed, 2])
    fresh = [row for row in held_out if prompt_group(row) not in posts]
    left_out = Counter(dropped)
    left_out.update(dropped_held_out)
    left_out["worker_not_among_users"] = len(train) - len(trained)
    left_out["validation_on_training_post"] = len(held_out) - len(fresh)
    data = PreferenceData(
        train=[row for row in rows if prompt_group(row) not in dev_posts],
        dev=[row for row in rows if prompt_group(row) in dev_posts],
        eval_seen=[row for row in fresh if row.user_id in known],
        eval_unseen=[row for row in fresh if row.user_id not in known],
        source=source,
        declared_users=tuple(users),
        preferences={worker: WISHES[longer] for worker, longer in tastes.items()},
    )
    return data, dict(left_out)


def _read_parquet(path: Path) -> list[_Labelled]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: needs pyarrow, which is not installed; `pip install pyarrow`, or give the JSON files "
                        "of the release") from error
    try:
        records = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not readable as parquet ({error}); fetch the file again") from error
    return [_labelled(record, f"{path}:{number}") for number, record in enumerate(records, start=1)]


def _labelled(record: dict[str, Any], where: str) -> _Labelled:
    info, summaries = record.get("info"), record.get("summaries")
    if not isinstance(info, dict):
        raise DataError(f"{where}: info is {quote(info)}, expected an object with post and title")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(each, dict) for each in summaries):
        raise DataError(f"{where}: summaries is {quote(summaries)}, expected two objects with text and policy")
    split = _text(record, "split", where)
    if split not in VALIDATION_SPLITS:
        raise DataError(f"{where}: split is {quote(split)}, expected one of {', '.join(VALIDATION_SPLITS)}")
    post = _text(info, "article" if info.get("post") is None else "post", where)
    subreddit = None if info.get("subreddit") is None else _text(info, "subreddit", where)
    first, second = (_text(summary, "text", where) for summary in summaries)
    policies = [_text(summary, "policy", where) for summary in summaries]
    prompt = make_prompt(_text(info, "title", where), post, subreddit)
    return _Labelled(
        Comparison(prompt, (first, second), _text(record, "worker", where)),
        validation=VALIDATION_SPLITS[split],
        supervised=all("sup" in policy and "ppo" not in policy and "cnn" not in policy for policy in policies),
    )


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {quote(value)}, expected a string")
    return value
