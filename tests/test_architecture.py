"""The package map holds: imports point downward, outer dependencies stay at the edges, public names are listed."""

from __future__ import annotations

import ast
import pathlib
import sys

import pytest

import equipoise

ROOT = pathlib.Path(equipoise.__file__).parent
LEVELS = {
    "state": 0,
    "solution": 0,
    "linalg": 0,
    "extras": 0,
    "map": 1,
    "solvers": 2,
    "gradients": 3,
    "fixed_point": 4,
    "nn": 5,
    "constraints": 4,
    "inputs": 5,
    "bilevel": 5,
    "models": 6,
    "certificate": 6,
    "files": 7,
    "train": 8,
    "estimators": 9,
    "report": 9,
    "export": 9,
    "cli": 10,
    "__main__": 11,
    "__init__": 11,
}
FILES = sorted(ROOT.rglob("*.py"))


def unit(path: pathlib.Path) -> str:
    """The module of the first level, or the package, that a file belongs to."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: pathlib.Path) -> list[tuple[str, bool]]:
    """Modules imported anywhere in a file, with whether the import stands at the top level."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "equipoise" else [module]
            found += [(name, id(node) in top) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: pathlib.Path) -> None:
    mine = unit(path)
    assert mine in LEVELS, f"{mine} is in no level; place it in the package map"
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] != "equipoise" or len(parts) == 1:
            continue
        theirs = parts[1]
        if theirs == mine or theirs.startswith("__"):
            continue
        lower = LEVELS[theirs] < LEVELS[mine] or (LEVELS[mine] == LEVELS[theirs] == 0)
        assert lower, f"{mine} (level {LEVELS[mine]}) imports {theirs} (level {LEVELS[theirs]})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_depends_on_torch_alone(path: pathlib.Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "equipoise"}
    if LEVELS[unit(path)] > 6 and unit(path) != "__init__":
        return
    for name, _ in imports(path):
        assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_level_zero_has_no_cycle() -> None:
    graph = {
        path.stem: {name.split(".")[1] for name, _ in imports(path) if name.startswith("equipoise.")}
        for path in FILES
        if LEVELS[unit(path)] == 0
    }
    order: list[str] = []
    while graph:
        free = [name for name, needs in graph.items() if not (needs & graph.keys())]
        assert free, f"cycle among {sorted(graph)}"
        order += free
        for name in free:
            del graph[name]


def test_importing_the_package_needs_torch_alone() -> None:
    for path in [ROOT / "__init__.py", *(p for p in FILES if LEVELS[unit(p)] <= 6)]:
        for name, _ in imports(path):
            assert name.split(".")[0] in {*sys.stdlib_module_names, "torch", "equipoise"}


def test_public_names() -> None:
    assert sorted(equipoise.__all__) == sorted(set(equipoise.__all__))
    for name in equipoise.__all__:
        assert getattr(equipoise, name).__doc__, f"{name} has no docstring"
    public = {name for name in vars(equipoise) if not name.startswith("_")}
    packages = {unit(path) for path in FILES}
    assert public - packages <= set(equipoise.__all__)
    page = ROOT.parents[1] / "docs" / "api.md"
    if page.exists():
        text = page.read_text()
        missing = [name for name in equipoise.__all__ if f"equipoise.{name}" not in text]
        assert not missing, f"docs/api.md lacks {missing}"
