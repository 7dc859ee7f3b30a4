"""YAML without its traps: what a setting looks like is what is read, anything doubtful is refused.

Plain scalars follow YAML 1.2: `null`, `true`, `false`, decimal numbers (`5e-5` is one) and nothing else, so `no` and
`1:30` are strings. Anchors, aliases, tags, duplicate keys, keys without a value and numbers with a leading zero are
errors.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from prlhf.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20

_CONSTANTS = {"null": None, "~": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")


class _Dumper(yaml.SafeDumper):
    """Quotes every string that either this reader or YAML 1.1 would take for something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        doubtful = _LEADING_ZERO.fullmatch(data) or not data or not isinstance(_plain_value(data), str)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if doubtful else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def load_yaml(text: str, where: str) -> Any:
    """The single document of a text as dicts, lists and scalars.

    Args:
        where: what the text is called in errors, such as the file's path.
    Raises: ConfigError: syntax errors, and everything that the module refuses, each with its line.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_BYTES} bytes, which no configuration needs; check the path")
    try:
        problems = _find_refused_syntax(text)
        if problems:
            raise ConfigError(*(f"{where}:{problem}" for problem in problems))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}{_describe_yaml_error(error)}") from None
    if node is None:
        raise ConfigError(f"{where}: empty, expected `key: value` lines")
    value = _node_value(node, problems)
    if problems:
        raise ConfigError(*(f"{where}:{problem}" for problem in problems))
    return value


def load_value(text: str, where: str) -> Any:
    """One value from a command line: a plain scalar, or YAML when it starts with a quote or a bracket.

    Raises: ConfigError: the text is empty, has a leading zero, or is not YAML.
    """
    text = text.strip()
    if text[:1] in ("{", "[", "'", '"'):
        return load_yaml(text, where)
    problem = _plain_problem(text)
    if problem:
        raise ConfigError(f"{where}: {problem}")
    return _plain_value(text)


def dump_yaml(value: Any) -> str:
    """Block YAML in the given order; `load_yaml` gives back an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _find_refused_syntax(text: str) -> list[str]:
    problems = []
    names: set[str] = set()
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = _line(event)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            return [f"{line}: nested more than {MAX_DEPTH} deep, expected at most three levels"]
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None and event.anchor not in names:
            names.add(event.anchor)
            problems.append(f"{line}: anchor or alias {event.anchor!r}, which is not allowed; write the value out")
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag is not None:
            problems.append(f"{line}: tag {event.tag!r}, which is not allowed; remove it")
    return problems


def _line(item: yaml.Event | yaml.Node) -> int:
    return item.start_mark.line + 1 if item.start_mark is not None else 1


def _node_value(node: yaml.Node, problems: list[str]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_node_value(item, problems) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping_value(node, problems)
    if isinstance(node, yaml.ScalarNode) and node.style is not None:
        return node.value
    problem = _plain_problem(node.value)
    if problem:
        problems.append(f"{_line(node)}: {problem}")
        return None
    return _plain_value(node.value)


def _mapping_value(node: yaml.MappingNode, problems: list[str]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = _line(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{line}: a list or mapping as a key, expected a name")
            continue
        if key_node.value in mapping:
            problems.append(f"{line}: duplicate key {key_node.value!r}; keep one of them")
        mapping[key_node.value] = _node_value(value_node, problems)
    return mapping


def _plain_problem(text: str) -> str | None:
    if not text:
        return "no value given; write null if none is meant"
    if _LEADING_ZERO.fullmatch(text):
        return f"{text!r} has a leading zero; write the number without it, or quote it if it is text"
    return None


def _plain_value(text: str) -> str | int | float | bool | None:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and any(character.isdigit() for character in text) and not text.lstrip("+-").isdigit():
        return float(text)
    return text


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f": not valid YAML: {chr(error.character)!r} as character {error.position + 1}; remove it"
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    if problem.startswith("but "):  # the rest of a sentence
        problem = f"{getattr(error, 'context', '')} {problem}"
    line = f":{mark.line + 1}" if mark is not None else ""
    return f"{line}: not valid YAML: {problem}; mend the line (text that holds special characters needs quotes)"
