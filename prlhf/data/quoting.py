"""How text from a file is shown inside a one-line message."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

SHOWN_CHARACTERS = 80
MATCHABLE_CHARACTERS = 200
MATCHABLE_NAMES = 10_000  # a third of a second; of many names one more is alike by chance


def quote(value: object) -> str:
    """`value` in quotes, cut to one short line; what cannot be printed, control codes too, is shown by its code."""
    shown = repr(value)
    if len(shown) <= SHOWN_CHARACTERS:
        return shown
    return f"{shown[:SHOWN_CHARACTERS]}... ({len(shown)} characters)"


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can write a text: not half of a surrogate pair, nor a byte of a command line that was not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escape_as_json(error: UnicodeError) -> tuple[str, int]:
    """An error handler of `codecs`: what an encoding lacks is shown by its code, in JSON as it is read there."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)), error.end


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """"; did you mean ..." with the closest known name, or nothing."""
    if len(name) > MATCHABLE_CHARACTERS:
        return ""
    short = (other for other in known if len(other) <= MATCHABLE_CHARACTERS)
    candidates = list(itertools.islice(short, MATCHABLE_NAMES + 1))
    if len(candidates) > MATCHABLE_NAMES:
        return ""
    matches = difflib.get_close_matches(name, candidates, n=1)
    return f"; did you mean {quote(matches[0])}?" if matches else ""
