"""Code blocks of README and docs, and the examples in docstrings."""

import doctest
import importlib
import pathlib
import pkgutil
import re
import sys
import types

import pytest
import torch

import equipoise

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w/]+\.py)\n")  # a block that begins so is a whole file
LONG = ("continuous", "estimators", "extending", "first-layer", "hypergradients", "lipschitz-mdeq", "train-a-recipe")
LANGUAGES = {"python", "console", "text", "yaml", "toml", "json"}


@pytest.fixture(autouse=True)
def _user_defaults(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page.stem in LONG else page for page in PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_code_blocks_run(page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run in order, in one namespace, after its files are written."""
    module = types.ModuleType("__docs__")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "__docs__", module)
    text = page.read_text()
    for match in BLOCK.finditer(text):
        language, rest, code = match.groups()
        assert language in LANGUAGES, f"{page.name}: a code block must name its language, got {language!r}"
        assert not rest.strip(), f"{page.name}: no attributes on code blocks, got {rest!r}"
        if language == "python" and (name := FILE.match(code)):
            target = tmp_path / name[1]
            target.parent.mkdir(exist_ok=True)
            target.write_text(code)
        elif language == "python":
            line = text[: match.start()].count("\n") + 1
            exec(compile("\n" * line + code, str(page), "exec"), vars(module))


def test_links_of_the_readme() -> None:
    """They start at the root of the repository, so that they work wherever the file is shown."""
    links = re.findall(r"\]\(([^)#]*)", PAGES[0].read_text())
    assert links
    for link in links:
        assert link.startswith("https://") or (link.startswith("/") and (ROOT / link[1:]).exists()), link


def modules() -> list[str]:
    edges = ("equipoise.cli", "equipoise.__main__")
    found = [m.name for m in pkgutil.walk_packages(equipoise.__path__, "equipoise.")]
    return [name for name in found if not name.startswith(edges)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
