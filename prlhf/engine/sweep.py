"""A sweep: one experiment trained at several settings, each in a run directory of its own, and one table of them."""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prlhf.config import Config, load_config, read_text
from prlhf.config_checks import NAME, NAME_RULE
from prlhf.engine.child import SignalRelay, is_finished, train_in_child
from prlhf.errors import ConfigError
from prlhf.evaluation.check_table import format_check_spans
from prlhf.evaluation.report import load_final
from prlhf.evaluation.sweep_table import format_sweep, summarize_sweep
from prlhf.files import write_json_atomic, write_text_atomic
from prlhf.schema import show
from prlhf.yaml_strict import load_yaml

logger = logging.getLogger(__name__)

KEYS = ("name", "base", "runs", "grid")
MAX_RUNS = 1000
Values = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its values by dotted key, as overrides of the base, and the configuration they make."""

    values: Values
    overrides: list[str]
    config: Config


@dataclass(frozen=True)
class Sweep:
    """A parsed sweep; its runs are `folder/<name of the point>`."""

    name: str
    base: str
    points: list[Point]


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep: every combination of an entry of `runs` with one value of each key of `grid`.

    Args:
        overrides: `key=value` on top of every run.
    Raises: ConfigError: one message for each mistake in the sweep, the base, or what they make together.
    """
    data = load_yaml(read_text(path), str(path))
    problems = _problems(data)
    if problems:
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    grid: dict[str, list[Any]] = data.get("grid", {})
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    settings = [{**entry, **combination} for entry in data.get("runs", [{}]) for combination in combinations]
    names = _make_names(settings)
    problems += [f"{count} runs would be named {name}" for name, count in Counter(names).items() if count > 1]
    points = []
    for name, values in zip(names, settings, strict=True):
        own = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in {**values, "name": name}.items()]
        try:
            config = load_config(data["base"], [*own, *overrides])
        except ConfigError as error:
            problems += [_without_origin(message, own) for message in error.messages]
            continue
        if config.method == "sft":
            problems.append("method: got sft, which has no preference accuracy to tabulate, expected another method")
        points.append(Point(values, [*own, *overrides], config))
    if problems:
        raise ConfigError(*dict.fromkeys(f"{path}: {problem}" for problem in problems))
    return Sweep(data["name"], data["base"], points)


def run_sweep(sweep: Sweep, *, runs: Path) -> tuple[str, list[str]]:
    """Train what is not finished, one run after the other; write `sweep.json` and `sweep.md` beside the runs.

    A run that fails does not hold up the others.

    Returns: the table of the finished runs, and a message for each run that failed.
    Raises: Preempted: a signal came; the same sweep goes on from there.
    """
    folder = runs / sweep.name
    failures, finished = [], []
    with SignalRelay() as relay:
        for number, point in enumerate(sweep.points, start=1):
            run_dir, where = folder / point.config.name, f"run {number} of {len(sweep.points)}: {point.config.name}"
            if is_finished(point.config, run_dir):
                logger.info("%s: finished", where)
            else:
                logger.info("%s", where)
                code = train_in_child(sweep.base, point.overrides, folder, relay)
                if code != 0:
                    failures.append(f"{where}: training ended with exit code {code}; see the messages above")
                    continue
            finished.append((point.config.name, point.values, point.config.seed, load_final(run_dir)))
    if not finished:
        return "", failures
    settings = summarize_sweep(finished)
    spans = format_check_spans({name: final for name, _, _, final in finished})
    table = format_sweep(settings) + (f"\n{spans}\n" if spans else "")
    write_json_atomic(folder / "sweep.json", {"sweep": sweep.name, "base": sweep.base, "settings": settings})
    write_text_atomic(folder / "sweep.md", f"# {sweep.name}\n\n{table}")
    return table, failures


def _problems(data: Any) -> list[str]:
    """What is wrong with the sweep's own keys; the values under them are the configuration's to judge."""
    if not isinstance(data, dict):
        return [f"got {show(data)}, expected a mapping with keys from {', '.join(KEYS)}"]
    problems = []
    for key in data.keys() - set(KEYS):
        close = difflib.get_close_matches(str(key), KEYS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(KEYS)}"
        problems.append(f"{key}: unknown key; {hint}")
    name, base = data.get("name"), data.get("base")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        problems.append(f"name: got {show(name)}, expected {NAME_RULE}")
    if not isinstance(base, str):
        problems.append(f"base: got {show(base)}, expected an experiment such as experiments/psoups.yaml")
    if not data.keys() & {"runs", "grid"}:
        problems.append("runs, grid: neither is there, expected `grid: {loss.alpha: [0.0, 0.5]}` or a list of `runs`")
    problems += _grid_problems(data.get("grid", {}), data.get("runs", [{}]))
    return problems


def _grid_problems(grid: Any, entries: Any) -> list[str]:
    if not isinstance(grid, dict):
        return [f"grid: got {show(grid)}, expected dotted keys, each with a list of values"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        return [f"runs: got {show(entries)}, expected a list of mappings such as {{loss.alpha: 0.5}}"]
    problems = [
        f"grid.{key}: got {show(values)}, expected a list of values"
        for key, values in grid.items()
        if not isinstance(values, list) or not values
    ]
    single = [(f"grid.{key}", value) for key, values in grid.items() if isinstance(values, list) for value in values]
    single += [(f"runs.{key}", value) for entry in entries for key, value in entry.items()]
    problems += [
        f"{where}: got {show(value)}, expected single settings by dotted key, such as user.kind"
        for where, value in single
        if isinstance(value, dict)
    ]
    both = sorted({key for entry in entries for key in entry if key in grid})
    problems += [f"{key}: in both runs and grid; keep one of them" for key in both]
    if any("name" in keys for keys in (grid, *entries)):
        problems.append("runs, grid: name is made from the values of a run; leave it out")
    count = len(entries)
    for values in grid.values():
        count *= len(values) if isinstance(values, list) else 1
    if count > MAX_RUNS:
        problems.append(f"grid: makes {count} runs, expected at most {MAX_RUNS}")
    return problems


def _make_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name a run: its keys, shortened where that leaves them apart, each with its value."""
    keys = list(dict.fromkeys(key for values in settings for key in values))
    tails = {key: key.rpartition(".")[2] for key in keys}
    shared = {tail for tail, count in Counter(tails.values()).items() if count > 1}
    short = {key: key if tail in shared else tail for key, tail in tails.items()}
    return ["_".join(f"{short[key]}-{_slug(value)}" for key, value in values.items()) for values in settings]


def _slug(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "empty"


def _without_origin(message: str, overrides: Sequence[str]) -> str:
    """A message about an override that the sweep wrote, without that override: the key alone says where it stands."""
    prefixes = (f"override {override!r}: " for override in overrides)
    return next((message.removeprefix(prefix) for prefix in prefixes if message.startswith(prefix)), message)
