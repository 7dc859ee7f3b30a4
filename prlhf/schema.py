"""Reads nested dicts into dataclasses by their type hints, collecting problems instead of stopping at the first."""

from __future__ import annotations

import difflib
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")

_TYPE_NAMES = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a setting; `keys` are the dotted keys that it involves, the one to change first."""

    keys: tuple[str, ...]
    text: str


def read_dataclass(root: type[T], data: Any, problems: list[Problem]) -> T:
    """An instance of a dataclass of dataclasses from nested dicts; absent keys take their defaults.

    Args:
        problems: every unknown key and unfit value is appended; such a field keeps its default.
    """
    result: T = _read_section(root, data, "", list(dotted_keys(root)), problems)
    return result


def dotted_keys(section: type[Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all fields that are not sections themselves."""
    for name, hint in typing.get_type_hints(section).items():
        key = join_keys(prefix, name)
        subsection = _section_type(hint)
        if subsection is None:
            yield key
        else:
            yield from dotted_keys(subsection, key)


def join_keys(prefix: str, name: object) -> str:
    """`prefix.name`, or the name alone at the top."""
    return f"{prefix}.{name}" if prefix else str(name)


def show(value: Any) -> str:
    """A value as YAML spells it, at most 80 characters."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_section(section: type[Any], data: Any, prefix: str, known: Sequence[str], problems: list[Problem]) -> Any:
    names = [item.name for item in fields(section)]
    if not isinstance(data, dict):
        text = f"got {show(data)}, expected a mapping with keys from {', '.join(names)}"
        problems.append(Problem((prefix,), text))
        return section()
    hints = typing.get_type_hints(section)
    values = {}
    for name, value in data.items():
        key = join_keys(prefix, name)
        if name not in names:
            problems.append(Problem((key,), f"unknown key; {_suggest_key(str(name), prefix, names, known)}"))
            continue
        subsection = _section_type(hints[name])
        fitting = [member for member in _members(hints[name]) if _fits(value, member)]
        if fitting:
            values[name] = _convert(value, fitting[0])
        elif subsection is not None:
            values[name] = _read_section(subsection, value, key, known, problems)
        else:
            problems.append(Problem((key,), f"got {show(value)}, expected {_expected(hints[name], value)}"))
    return section(**values)


def _section_type(hint: Any) -> type[Any] | None:
    return next((member for member in _members(hint) if isinstance(member, type) and is_dataclass(member)), None)


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value: Any, member: Any) -> bool:
    if typing.get_origin(member) is Literal:
        return isinstance(value, str) and value in typing.get_args(member)
    if typing.get_origin(member) is tuple:
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if member is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, member)


def _convert(value: Any, member: Any) -> Any:
    if member is float:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _expected(hint: Any, value: Any) -> str:
    expected: list[str] = []
    choices: list[str] = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            choices += typing.get_args(member)
            expected.append(" | ".join(choices))
        elif typing.get_origin(member) is tuple:
            expected.append("a list of text")
        else:
            expected.append(_TYPE_NAMES.get(member, "null"))
    close = difflib.get_close_matches(str(value), choices, n=1)
    return " or ".join(expected) + (f"; did you mean {close[0]}?" if close else "")


def _suggest_key(name: str, prefix: str, names: Sequence[str], known: Sequence[str]) -> str:
    close = [join_keys(prefix, match) for match in difflib.get_close_matches(name, names, n=1)]
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    suggestions = close or elsewhere
    return f"did you mean {' or '.join(suggestions)}?" if suggestions else f"expected one of {', '.join(names)}"
