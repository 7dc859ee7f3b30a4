"""Imports point downwards: no package knows one above or beside it, and no module waits for itself."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "prlhf"
LAYERS = [
    {"errors"},
    {"distributed", "files", "schema", "sharding", "yaml_strict"},
    {"losses", "usermodel", "data"},
    {"models"},
    {"generation"},
    {"evaluation"},
    {"config_checks"},
    {"config"},
    {"engine"},
    {"adapt", "recipes", "serving"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_FROM = {"losses": ["errors"], "usermodel": ["errors"], "data": ["errors", "files"]}
PURE_TORCH = {"losses", "usermodel"}


def read_imports(package: Path) -> dict[str, set[str]]:
    """Dotted module -> dotted modules it imports anywhere in the file; names inside the package are its files."""
    files = {_module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    imports = {}
    for module, path in files.items():
        found = _imported_names(ast.parse(path.read_text()), module, path.name == "__init__.py")
        imports[module] = {_innermost_module(name, files) for name in found}
    return imports


def _module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _innermost_module(name: str, files: dict[str, Path]) -> str:
    parent = name.rpartition(".")[0]
    return parent if name not in files and parent in files else name


def find_violations(imports: dict[str, set[str]]) -> list[str]:
    """Every import that goes up, sideways, or out of the purest packages."""
    violations = []
    for module, targets in imports.items():
        home = (module.split(".") + [""])[1]
        for target in sorted(targets):
            root, name = (target.split(".") + [""])[:2]
            if root != "prlhf":
                if home in PURE_TORCH and root != "torch" and root not in sys.stdlib_module_names:
                    violations.append(f"{module} imports {target}: {home} may import torch only")
            elif home in ONLY_FROM and name not in (home, *ONLY_FROM[home]):
                violations.append(f"{module} imports {target}: {home} may import {' and '.join(ONLY_FROM[home])} only")
            elif name != home and name and LEVEL.get(name, len(LAYERS)) >= LEVEL.get(home, -1):
                violations.append(f"{module} imports {target}: not a lower layer")
    return violations


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or an empty list."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :] + [module]
        if module in finished:
            return []
        for target in sorted(imports.get(module, ())):
            cycle = visit(target, [*path, module])
            if cycle:
                return cycle
        finished.add(module)
        return []

    return next((cycle for module in imports if (cycle := visit(module, []))), [])


def _write_package(root: Path, sources: dict[str, str]) -> dict[str, set[str]]:
    for name, source in sources.items():
        path = root / "prlhf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_imports(root / "prlhf")


def test_every_import_points_to_a_lower_layer() -> None:
    assert find_violations(read_imports(PACKAGE)) == []


def test_no_module_imports_itself_through_others() -> None:
    assert find_cycle(read_imports(PACKAGE)) == []


def test_every_top_level_name_has_a_layer() -> None:
    names = {module.split(".")[1] for module in read_imports(PACKAGE) if "." in module}
    assert names <= LEVEL.keys()


def test_the_check_sees_upward_sideways_and_foreign_imports(tmp_path: Path) -> None:
    imports = _write_package(
        tmp_path,
        {
            "errors.py": "import torch\n",
            "models/policy.py": "def f():\n    from prlhf.engine import step\n",
            "engine/step.py": "from ..models import policy\nimport prlhf.losses.dpo\n",
            "losses/dpo.py": "from prlhf.data import collate\nfrom prlhf.errors import PrlhfError\nimport numpy\n",
            "data/collate.py": "import prlhf.distributed\n",
        },
    )
    assert sorted(find_violations(imports)) == [
        "prlhf.data.collate imports prlhf.distributed: data may import errors and files only",
        "prlhf.losses.dpo imports numpy: losses may import torch only",
        "prlhf.losses.dpo imports prlhf.data.collate: losses may import errors only",
        "prlhf.models.policy imports prlhf.engine.step: not a lower layer",
    ]


def test_the_check_sees_a_ring_inside_a_package(tmp_path: Path) -> None:
    sources = {"models/__init__.py": "from .a import f\n", "models/a.py": "from .b import g\n", "models/b.py": ""}
    assert find_cycle(_write_package(tmp_path, sources)) == []
    imports = _write_package(tmp_path, {"models/b.py": "from prlhf.models import f\n"})
    assert find_cycle(imports) == ["prlhf.models", "prlhf.models.a", "prlhf.models.b", "prlhf.models"]
