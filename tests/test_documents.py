"""Commands in the documents are commands of the program, on experiments that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from prlhf.cli import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _commands(document: Path) -> list[list[str]]:
    """The `prlhf ...` commands in its blocks of code, each as its arguments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.split(" > ")[0] for line in lines for part in line.split(" # ")[0].split("&&")]
    words = [shlex.split(part, comments=True) for part in parts if re.match(r"\s*(\S*/)?prlhf ", part)]
    return [command[1:] for command in words]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_parses_and_names_experiments_that_exist(document: Path) -> None:
    for command in _commands(document):
        assert parse_arguments(command), command
        for word in command:
            if word.startswith("experiments/"):
                assert (ROOT / word).is_file(), command


def test_the_readme_has_the_commands() -> None:
    used = {command[0] for command in _commands(ROOT / "README.md")}
    assert used >= {"train", "chat", "adapt", "forget", "export", "users", "score", "data", "compare"}
