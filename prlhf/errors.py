"""Errors that a user can cause and mend; each message is one line: what, where, what to do."""

from __future__ import annotations


class PrlhfError(ValueError):
    """A user's mistake, or a state of the disk; printed without a traceback.

    Args:
        *messages: one line each, all that were found, not only the first. What cannot be printed is shown by its code:
            a key, a name or a path may hold what moves a terminal's cursor or turns the direction of its text.
    """

    exit_code = 2

    def __init__(self, *messages: str) -> None:
        self.messages = [printable(message) for message in messages]
        super().__init__("\n".join(self.messages))


def printable(message: str) -> str:
    """One line of text with what cannot be printed shown by its code."""
    line = " ".join(message.split("\n"))
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


class ConfigError(PrlhfError):
    """The configuration is wrong: unknown key, wrong type, impossible combination."""


class DataError(PrlhfError):
    """The data is missing, malformed, or names an unknown user."""


class ModelError(PrlhfError):
    """The backbone or its tokenizer cannot be used."""


class RunDirError(PrlhfError):
    """The run directory is in use, unwritable, or belongs to another configuration."""


class CheckpointError(PrlhfError):
    """A checkpoint does not verify or does not fit the model."""


class NoCheckpointError(CheckpointError):
    """No checkpoint in the directory verifies."""

    exit_code = 3


class RankError(PrlhfError, RuntimeError):
    """Another rank is gone, or does not answer."""

    exit_code = 1


class Preempted(Exception):
    """A signal asked the run to stop; everything was saved."""

    exit_code = 75
