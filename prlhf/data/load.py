"""Data sources: a built-in world, a prepared directory, or one file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from prlhf.data.clean import pair_id_conflicts
from prlhf.data.jsonl import OnBadRow, read_rows
from prlhf.data.labelled import preferences_from_labelled
from prlhf.data.prepared import SPLITS, all_labelled, clean_and_warn, load_prepared, read_judgments
from prlhf.data.records import LabelledData, PreferenceData, PreferenceRow, ResponseRow, preference_row, response_row
from prlhf.data.splits import Data, Split, split_labelled, split_preferences, split_responses
from prlhf.data.texts import is_json, read_text_lines
from prlhf.errors import DataError

BUILTIN_PSOUPS = "builtin:psoups"
BUILTIN_TLDR = "builtin:tldr"
BUILTIN_PRISM = "builtin:prism"
BUILTIN_PREFERENCES = (BUILTIN_PSOUPS, BUILTIN_TLDR, BUILTIN_PRISM)
BUILTIN_TEXT = "builtin:text"
BUILTIN_TEXT_SECOND = "builtin:text2"
BUILTIN_TLDR_TEXT = "builtin:tldr_text"
BUILTIN_PRISM_TEXT = "builtin:prism_text"
BUILTIN_RESPONSES = (BUILTIN_TEXT, BUILTIN_TEXT_SECOND, BUILTIN_TLDR_TEXT, BUILTIN_PRISM_TEXT)
MAX_NEUTRAL_TEXTS = 96
logger = logging.getLogger(__name__)


def load_preference_data(source: str, **options: Any) -> PreferenceData:
    """Load pairs.

    Args:
        **options: of `load_judged_data`.
    Raises: DataError: no such source, or bad or unpaired data; file and line are named.
    """
    data = load_judged_data(source, **options)
    if isinstance(data, LabelledData):
        raise DataError(f"data.source {source!r}: holds unpaired rows (a response and a label), expected pairs (chosen "
                        "and rejected); train on it with loss.kind kto, or give pairs")
    return data


def load_judged_data(
    source: str, *, seed: int, eval_prompts: float, unseen_users: float, on_bad_row: OnBadRow = "error"
) -> PreferenceData | LabelledData:
    """Load pairs or unpaired rows, whichever the source holds.

    Args:
        source: "builtin:psoups", "builtin:tldr", "builtin:prism", a prepared directory, or one .jsonl file, which is
            split in memory and says so.
        seed: of a built-in world, or of the split of a single file.
        eval_prompts: share of a single file's prompts held out.
        unseen_users: share of a single file's users held out.
        on_bad_row: "error", or "skip" to pass over at most 1% of bad rows.
    Raises: DataError: no such source, or bad data; file and line are named.
    """
    if source == BUILTIN_PSOUPS:
        from prlhf.data.world.psoups import build_psoups

        return build_psoups(seed)
    if source == BUILTIN_TLDR:
        from prlhf.data.world.tldr import build_tldr

        return build_tldr(seed)
    if source == BUILTIN_PRISM:
        from prlhf.data.world.prism import build_prism

        return build_prism(seed)
    path = _existing(source, BUILTIN_PREFERENCES)
    if path.is_dir():
        return load_prepared(path, on_bad_row=on_bad_row)
    rows, labelled = _read_file(path, on_bad_row)
    shares: dict[str, Any] = {"seed": seed, "eval_prompts": eval_prompts, "unseen_users": unseen_users}
    if labelled:
        return _log_split(split_labelled(rows, source=str(path), **shares), seed)
    return _split(rows, str(path), **shares)


def load_evaluation_file(path: Path) -> PreferenceData:
    """All rows of a .jsonl file as evaluation rows, their users as seen ones; of unpaired rows the pairs in them.

    Raises: DataError: no such file, or bad data; file and line are named.
    """
    rows, labelled = _read_file(_existing(str(path), ()), "error")
    users = tuple(dict.fromkeys(row.user_id for row in rows))
    options: dict[str, Any] = {
        "train": [], "dev": [], "eval_seen": rows, "eval_unseen": [], "source": str(path), "declared_users": users
    }
    return preferences_from_labelled(LabelledData(**options)) if labelled else PreferenceData(**options)


def _read_file(path: Path, on_bad_row: OnBadRow) -> tuple[list[Any], bool]:
    """Usable rows of a .jsonl file, and whether they are unpaired ones."""
    located = read_judgments(path, on_bad_row)
    labelled = all_labelled(located, path)
    conflicts = pair_id_conflicts((where, row) for where, row in located if isinstance(row, PreferenceRow))
    if conflicts:
        raise DataError(*conflicts)
    rows = clean_and_warn(path, located)
    if not rows:
        raise DataError(f"{path}: no usable rows; at least one is needed")
    return rows, labelled


def load_response_rows(
    source: str, *, seed: int, eval_prompts: float, unseen_users: float = 0.0, on_bad_row: OnBadRow = "error"
) -> tuple[list[ResponseRow], list[ResponseRow]]:
    """Load (train, dev) rows for sft: {"text"}, {"prompt", "response"}, or the chosen responses of preference rows.

    A single file of preference rows is split as for preference training, so that prompts held out there stay unknown
    here; a file of other rows gives 5% of its prompts to dev. Rows with a label are refused.

    Args:
        source: "builtin:text", "builtin:text2" (its second stage), "builtin:tldr_text", "builtin:prism_text", a set of
            built-in preferences, a directory with train.jsonl (and dev.jsonl), or one .jsonl file.
        seed: see load_preference_data, as for the others.
    Raises: DataError: no such source, or bad data; file and line are named.
    """
    if source in (BUILTIN_TEXT, BUILTIN_TEXT_SECOND):
        from prlhf.data.world.text import build_text

        return build_text(seed, second_stage=source == BUILTIN_TEXT_SECOND)
    if source == BUILTIN_TLDR_TEXT:
        from prlhf.data.world.tldr import build_tldr_text

        return build_tldr_text(seed)
    if source == BUILTIN_PRISM_TEXT:
        from prlhf.data.world.prism import build_prism_text

        return build_prism_text(seed)
    if source in BUILTIN_PREFERENCES:
        return _chosen(load_preference_data(source, seed=seed, eval_prompts=eval_prompts, unseen_users=unseen_users))
    path = _existing(source, (*BUILTIN_RESPONSES, *BUILTIN_PREFERENCES))
    if path.is_dir():
        train, dev = path / "train.jsonl", path / "dev.jsonl"
        if not train.is_file():
            raise DataError(f"{path}: no train.jsonl; give a directory with one, or a .jsonl file")
        return _responses(train, on_bad_row), _responses(dev, on_bad_row) if dev.exists() else []
    rows = [row for _, row in read_rows(path, _preference_or_response, on_bad_row=on_bad_row)]
    preferences = [row for row in rows if isinstance(row, PreferenceRow)]
    if not rows:
        raise DataError(f"{path}: no rows; training needs at least one")
    if not preferences:
        return split_responses([row for row in rows if isinstance(row, ResponseRow)], seed=seed)
    if len(preferences) < len(rows):
        raise DataError(f"{path}: {len(preferences)} of {len(rows)} rows are preferences; "
                        "keep rows of one kind in a file")
    return _chosen(_split(preferences, str(path), seed=seed, eval_prompts=eval_prompts, unseen_users=unseen_users))


def load_neutral_texts(path: str | None, data: PreferenceData) -> list[ResponseRow]:
    """Texts that no user judged, at most 96; none for data that is not built in when no path is given.

    For built-in data: dev rows of "builtin:text", in all styles, which the built-in model's first stage did not read.

    Args:
        path: one text a line, or .json or .jsonl with {"text"} or {"prompt", "response"}.
        data: a row with a prompt or a response of these is left out.
    Raises: DataError: no such file, or no text is left in it.
    """
    if path is None and data.world is None:
        return []
    if path is None:
        _, rows = load_response_rows(BUILTIN_TEXT, seed=0, eval_prompts=0.0)
    elif is_json(Path(path)):
        rows = _responses(Path(path).expanduser(), "error")
    else:
        rows = [ResponseRow("", line) for line in read_text_lines(Path(path).expanduser(), "text")]
    judged = [row for name in SPLITS for row in getattr(data, name)]
    prompts = {row.prompt for row in judged}
    responses = {response for row in judged for response in (row.chosen, row.rejected)}
    neutral = [row for row in rows if row.prompt not in prompts and row.response not in responses]
    if not neutral:
        raise DataError(f"{path or BUILTIN_TEXT}: holds no text that no user judged; give a file of other texts")
    return neutral[:MAX_NEUTRAL_TEXTS]


def _existing(source: str, builtin: tuple[str, ...]) -> Path:
    path = Path(source).expanduser()
    if source.startswith("builtin:") or not path.exists():
        raise DataError(f"data.source {source!r}: no such file, directory or built-in data set; "
                        f"give a path or one of {', '.join(builtin)}")
    return path


def _split(
    rows: list[PreferenceRow], source: str, *, seed: int, eval_prompts: float, unseen_users: float
) -> PreferenceData:
    split = split_preferences(rows, source=source, seed=seed, eval_prompts=eval_prompts, unseen_users=unseen_users)
    return _log_split(split, seed)


def _log_split(split: Split[Data], seed: int) -> Data:
    data = split.data
    logger.info(
        "%s: split in memory by prompt and user (seed %d): train %d, dev %d, eval_seen %d, eval_unseen %d, left out %d",
        data.source, seed, len(data.train), len(data.dev), len(data.eval_seen), len(data.eval_unseen),
        split.num_left_out,
    )
    return data


def _responses(path: Path, on_bad_row: OnBadRow) -> list[ResponseRow]:
    return [row for _, row in read_rows(path, response_row, on_bad_row=on_bad_row)]


def _preference_or_response(record: dict[str, Any], where: str) -> PreferenceRow | ResponseRow:
    if "chosen" in record and "user_id" in record:
        return preference_row(record, where)
    return response_row(record, where)


def _chosen(data: PreferenceData) -> tuple[list[ResponseRow], list[ResponseRow]]:
    def responses(rows: list[PreferenceRow]) -> list[ResponseRow]:
        return [ResponseRow(row.prompt, row.chosen, row.user_text) for row in rows]

    return responses(data.train), responses(data.dev)
