"""The package map: imports point down and form no circle, heavy dependencies stay at the edges."""

import ast
import functools
import graphlib
import pathlib
import sys

import equipoise

ROOT = pathlib.Path(equipoise.__file__).parent
# Lowest first; the members of a line do not import each other. Those up to `METHODS` need torch alone.
LEVELS = (
    ("core",),
    ("solvers",),
    ("gradients",),
    ("fixed_point",),
    ("nn", "constraints"),
    ("contraction", "inputs", "bilevel"),
    ("files",),
    ("data",),
    ("train",),
    ("zoo",),
    ("estimators", "report"),
    ("cli",),
    ("__main__", "__init__"),
)
METHODS = 5
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(path: pathlib.Path) -> set[str]:
    """Modules imported anywhere in a file, under `TYPE_CHECKING` and inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    """The imports of each module."""
    return {name: imports(path) for name, path in FILES.items()}


def unit(module: str) -> str:
    """The module or package of the first level to which a module belongs."""
    return module.split(".")[1] if "." in module else "__init__"


def test_no_circle_between_files() -> None:
    inner = {name: found & FILES.keys() - {name, "equipoise"} for name, found in graph().items()}
    graphlib.TopologicalSorter(inner).prepare()  # raises CycleError, which names the circle


def test_imports_point_down() -> None:
    for name, found in graph().items():
        mine = unit(name)
        for other in found & FILES.keys() - {"equipoise"}:
            theirs = unit(other)
            assert theirs == mine or LEVEL[theirs] < LEVEL[mine], f"{name} imports {other}"


def test_methods_need_torch_alone() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "equipoise"}
    for name, found in graph().items():
        if LEVEL[unit(name)] <= METHODS or name == "equipoise":
            outside = {module for module in found if module.split(".")[0] not in allowed}
            assert not outside, f"{name} imports {outside}"


def test_public_names_are_documented() -> None:
    text = "".join(page.read_text() for page in (ROOT.parents[1] / "docs" / "api").glob("*.md"))
    for name in equipoise.__all__:
        assert getattr(equipoise, name).__doc__, f"{name} has no docstring"
        assert f"equipoise.{name}" in text, f"docs/api lacks {name}"
