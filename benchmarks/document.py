"""Put what a benchmark measured into a Markdown file, in place of what it measured before."""

from __future__ import annotations

import datetime
from pathlib import Path


def describe_run(command: str, **setting: object) -> str:
    """One line: the date, the command and its setting."""
    values = ", ".join(f"{key} {value}" for key, value in setting.items())
    return f"{datetime.date.today().isoformat()}, `{command}`: {values}."


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->`, or append both and the text.

    Raises: ValueError: only one of the two lines is there.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    document = path.read_text(encoding="utf-8") if path.exists() else ""
    if (begin in document) != (end in document):
        raise ValueError(f"{path}: holds one of '{begin}' and '{end}' without the other")
    section = f"{begin}\n{text}\n{end}"
    if begin in document:
        before, rest = document.split(begin, 1)
        document = before + section + rest.split(end, 1)[1]
    else:
        document = f"{document.rstrip()}\n\n{section}\n".lstrip()
    path.write_text(document, encoding="utf-8")
