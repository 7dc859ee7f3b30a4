"""Files of prompts and of plain texts: JSON by the file's name, else one text a line."""

from __future__ import annotations

import logging
from pathlib import Path

from prlhf.data.jsonl import read_jsonl, refuse_table
from prlhf.data.quoting import quote
from prlhf.data.records import Prompt, response_row
from prlhf.errors import DataError

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
PROMPT_FIELDS = ("prompt", "user_text")
logger = logging.getLogger(__name__)


def is_json(path: Path) -> bool:
    """Whether a file is JSON or JSON Lines, by its name."""
    return path.name.endswith(JSON_SUFFIXES)


def read_text_lines(path: Path, noun: str) -> list[str]:
    """The lines of a text file without blank ones and without what surrounds each; only "\\n" ends a line.

    Args:
        noun: what a line is, for the message.
    Raises: DataError: unreadable, not UTF-8, or a table.
    """
    refuse_table(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a UTF-8 text file with one {noun} a line") from None
    return [line.strip() for line in lines if line.strip()]


def read_prompts(path: Path) -> list[tuple[Prompt, str]]:
    """(prompt, user_text) of each line or object; columns that are not used are named in a warning.

    Raises: DataError: a file that cannot be read, a line without prompt, or no prompt at all.
    """
    prompts: list[tuple[Prompt, str]] = (
        _prompts_of_objects(path) if is_json(path) else [(line, "") for line in read_text_lines(path, "prompt")]
    )
    if not prompts:
        raise DataError(f"{path}: holds no prompt; write one a line")
    return prompts


def _prompts_of_objects(path: Path) -> list[tuple[Prompt, str]]:
    prompts: list[tuple[Prompt, str]] = []
    ignored: set[str] = set()
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        if not record.get("prompt"):
            raise DataError(f'{where}: no "prompt"; expected {{"prompt": "..."}}')
        own = {name: record[name] for name in PROMPT_FIELDS if name in record}
        row = response_row({**own, "response": ""}, where)
        prompts.append((row.prompt, row.user_text))
        ignored.update(record.keys() - set(PROMPT_FIELDS))
    if ignored:
        logger.warning("%s: columns that are not used: %s", path, quote(sorted(ignored)))
    return prompts
