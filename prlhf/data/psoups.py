"""Reader of the Personalized Soups release: rm_training/P1A.json ... P3B.json.

Source: Jang et al. 2023, arXiv:2310.11564; github.com/joeljang/RLPHF.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prlhf.data.clean import clean_rows
from prlhf.data.jsonl import read_rows
from prlhf.data.prepared import PreparedSummary, check_writable, write_prepared
from prlhf.data.quoting import did_you_mean, quote
from prlhf.data.records import PreferenceRow, make_pair_id
from prlhf.data.splits import split_preferences
from prlhf.errors import DataError

PREFERENCE_PROMPTS = {
    "P1A": "Generate a response that can be easily understood by an elementary school student.",
    "P1B": "Generate a response that only a PhD Student in that specific field could understand.",
    "P2A": "Generate a response that is concise and to the point without being verbose.",
    "P2B": "Generate a response that is very informative without missing any background information.",
    "P3A": "Generate a response that is friendly, witty, funny, and humorous, like a close friend.",
    "P3B": "Generate a response in an unfriendly manner.",
}


def prepare_psoups(
    raw: Path, out: Path, *, unseen_users: float, eval_prompts: float, seed: int, force: bool = False
) -> PreparedSummary:
    """Read the release and write a prepared directory with the users P1A ... P3B.

    Args:
        raw: the unpacked release, or its folder rm_training.
    Raises: DataError: a file is missing or malformed, or `out` is not empty.
    """
    check_writable(out, force=force)
    rows, dropped = read_psoups(raw)
    split = split_preferences(
        rows, source=str(raw), seed=seed, eval_prompts=eval_prompts, unseen_users=unseen_users
    )
    left_out = {**dropped, "unseen_user_on_training_prompt": split.num_left_out}
    data = replace(split.data, preferences=PREFERENCE_PROMPTS)
    return write_prepared(out, data, force=force, left_out=left_out)


def read_psoups(raw: Path) -> tuple[list[PreferenceRow], dict[str, int]]:
    """Rows of all six users, without identical responses and repetitions; the preference prompt is cut from the input.

    Repetitions are found before the prompt is cut, as the authors of P-RLHF do it; they keep 53,471 rows.
    Rows with an empty input or response, which they keep, are left out here.

    Returns: (rows, reason -> number of rows left out).
    Raises: DataError: a file is missing or malformed.
    """
    folder = raw / "rm_training" if (raw / "rm_training").is_dir() else raw
    missing = [f"{user_id}.json" for user_id in PREFERENCE_PROMPTS if not (folder / f"{user_id}.json").is_file()]
    if missing:
        raise DataError(f"{folder}: no {', '.join(missing)}; give the unpacked release of Personalized Soups")
    rows: list[PreferenceRow] = []
    dropped: Counter[str] = Counter()
    for user_id, preference_prompt in PREFERENCE_PROMPTS.items():
        judged = [row for _, row in read_rows(folder / f"{user_id}.json", _judgment(user_id))]
        kept, reasons = clean_rows(judged)
        dropped.update(reasons)
        rows.extend(_without(row, preference_prompt) for row in kept)
    return rows, dict(dropped)


def _judgment(user_id: str) -> Callable[[dict[str, Any], str], PreferenceRow]:
    def parse(record: dict[str, Any], where: str) -> PreferenceRow:
        """The judgment: `completion_a` is the preferred one in the raw files."""
        prompt = _text(record, "user_input", where)
        return PreferenceRow(
            "", user_id, prompt, _text(record, "completion_a", where), _text(record, "completion_b", where)
        )

    return parse


def _without(row: PreferenceRow, preference_prompt: str) -> PreferenceRow:
    prompt = str(row.prompt).replace(preference_prompt, "").strip()
    pair_id = make_pair_id(prompt, row.chosen, row.rejected)
    return PreferenceRow(pair_id, row.user_id, prompt, row.chosen, row.rejected)


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {quote(value)}, expected a string{did_you_mean(name, record)}")
    return value
