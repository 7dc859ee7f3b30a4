"""Files that somebody else wrote are data: nothing in the package can run what they hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "prlhf"
# Modules that run code on loading, and calls that do.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle", "runpy", "code"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "np.load", "numpy.load", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.hub.load", "dcp.load", "pd.read_pickle",
}
UNTRUSTING_KEYWORDS = {"trust_remote_code", "allow_pickle", "weights_only"}  # True, True and False would run code


def find_offences(source: str) -> list[str]:
    """Imports and calls that can run what a file holds, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {name.name}" for name in node.names if _root(name.name)]
        elif isinstance(node, ast.ImportFrom) and node.module and _root(node.module):
            found.append(f"{node.lineno}: from {node.module}")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {name}()")
            for keyword in node.keywords:
                unsafe = keyword.arg != "weights_only"
                if keyword.arg in UNTRUSTING_KEYWORDS and ast.unparse(keyword.value) != str(not unsafe):
                    found.append(f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return found


def _root(module: str) -> bool:
    return module.split(".")[0] in FORBIDDEN_MODULES


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_can_run_what_a_file_holds(path: Path) -> None:
    assert find_offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "torch.load(path)", "np.load(path, allow_pickle=True)",
        "yaml.load(text)", "eval(text)", "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "torch.something(path, weights_only=False)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert find_offences(source)


def test_safe_calls_pass() -> None:
    assert find_offences("yaml.safe_load(t)\nload_file(p)\nfrom_pretrained(x, trust_remote_code=False)") == []
