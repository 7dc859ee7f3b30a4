"""The shipped experiments, for those who have the package and not the repository."""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Collection
from pathlib import Path

from prlhf.errors import ConfigError
from prlhf.files import make_place, write_text_atomic

INSTALLED = Path("share") / "prlhf" / "experiments"  # under the environment's data directory, see setup.cfg


def recipes_dir() -> Path:
    """Where the experiments are: beside the package in the repository, else where they were installed.

    Raises: ConfigError: they are in neither place.
    """
    places = [Path(__file__).resolve().parents[1] / "experiments", Path(sysconfig.get_path("data")) / INSTALLED]
    for place in places:
        if (place / "psoups.yaml").is_file():
            return place
    raise ConfigError(f"recipes: no experiments in {places[0]} or {places[1]}; install prlhf again")


def list_recipes() -> dict[str, str]:
    """Name, such as `psoups` or `paper/tldr` -> what its file says in its first words."""
    root = recipes_dir()
    return {
        path.relative_to(root).with_suffix("").as_posix(): _first_words(path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.yaml"))
    }


def copy_recipes(names: list[str], out: Path) -> list[Path]:
    """Copy experiments into a folder, by their names; all or none. A sweep varies its experiment's copy, if any.

    Raises: ConfigError: an unknown name, or a file of that name is there, one line each.
    """
    root, known = recipes_dir(), list_recipes()
    targets = {name: out / f"{name}.yaml" for name in dict.fromkeys(names)}
    problems = [f"recipes: no {name}; `prlhf recipes ls` names them" for name in targets if name not in known]
    problems += [f"{path}: exists; choose another --out" for path in targets.values() if path.exists()]
    if problems:
        raise ConfigError(*problems)
    for name, path in targets.items():
        make_place(path)
        write_text_atomic(path, _on_copies((root / f"{name}.yaml").read_text(encoding="utf-8"), out, targets))
    return list(targets.values())


def _on_copies(text: str, out: Path, copied: Collection[str]) -> str:
    """A sweep's text, with its experiment taken from the folder where that is copied, too; any other text as it is."""
    base = re.search(r"^base: experiments/(\S+)\.yaml$", text, flags=re.MULTILINE)
    if base is None or base[1] not in copied:
        return text
    return text.replace(base[0], f"base: {json.dumps(str(out / f'{base[1]}.yaml'), ensure_ascii=False)}")


def _first_words(text: str) -> str:
    """The first sentence of the comment that a file begins with."""
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return re.split(r"(?<!al)\. ", " ".join(comment))[0].rstrip(".:")  # "Li et al." ends no sentence
