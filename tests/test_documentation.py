"""The documentation names what there is: files, tests, modules, commands and links."""

import ast
import importlib
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from lossworks.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("platform", "jobs", "tune", "federated")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def code_of(page: Path) -> list[str]:
    """Return what stands in backticks on a page, and each line of its commands and Python code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for language, block in blocks if language != "toml" for line in block.splitlines()]
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"`([^`\n]+)`", rest), *lines]


def names_of_tests(path: Path) -> set[str]:
    """Return the names of the functions in a file of tests."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@by_page
def test_links_lead_to_files(page):
    """Those within the repository; a part of a page is one of its headings."""
    targets = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8"))
    missing = [path for path, _ in targets if path and not (page.parent / path).exists()]
    parts = {
        f"{path}#{part}"
        for path, part in targets
        if part and part not in headings(page.parent / path if path else page)
    }

    assert missing == []
    assert parts == set()


def headings(page: Path) -> set[str]:
    """Return the names by which a page's headings are linked to."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in found]
    return {re.sub(r"\s", "-", heading.strip()) for heading in plain}


@by_page
def test_files_that_are_named_exist(page):
    """Specs, studies, sources and tests, with the test where one is named."""
    named = [text for text in code_of(page) for text in re.findall(r"[\w./-]+/[\w./*-]+(?:::\w+)?", text)]
    ours = [name for name in named if name.partition("/")[0] in (*ROOMS, "tests", "docs", "lossworks")]
    missing = [name for name in ours if not is_there(name)]

    assert missing == []


@by_page
def test_tests_that_are_named_exist(page):
    """Also where their file is not said again."""
    named = {text for text in code_of(page) if re.fullmatch(r"test_\w+", text)}
    known = {name for file in (ROOT / "tests").rglob("test_*.py") for name in names_of_tests(file)}

    assert named - known == set()


def is_there(name: str) -> bool:
    """Return whether a file, or a test ``FILE::NAME``, is in the repository or in one of its packages."""
    path, _, test = name.rstrip(".").partition("::")
    found = [place for top in (ROOT, *(ROOT / room for room in ROOMS)) for place in top.glob(path)]
    return bool(found) and (not test or test in names_of_tests(found[0]))


@by_page
def test_modules_that_are_named_exist(page):
    """With what they hold, where that is named."""
    named = {
        name
        for text in code_of(page)
        for name in re.findall(r"(?<![\w./-])lossworks(?:_jobs|_tune|_federated)?(?:\.[A-Za-z_]\w*)+", text)
    }

    assert [name for name in named if not exists(name)] == []


def exists(name: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    parent, _, last = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(parent), last) or importlib.import_module(name) is not None
    except ImportError:
        return False


@by_page
def test_commands_that_are_named_exist(page):
    """The word after ``lossworks`` is a command."""
    commands = {point.name for point in entry_points(group="lossworks.commands")}
    found = {
        word
        for text in code_of(page)
        if not text.startswith(("from ", "import "))
        for word in re.findall(r"(?:^|[\s|;(])lossworks ([a-z][\w-]*)", text)
    }

    assert found - commands == set()


def specs_in(page: Path) -> list[list[str]]:
    """Return the arguments of each command on a page that runs a spec of the repository."""
    lines = [shlex.split(text, comments=True) for text in code_of(page) if text.startswith("lossworks ")]
    return [
        words[1:]
        for words in lines
        if words[1] in ("train", "tune", "federate") and len(words) > 2 and is_there(words[2])
    ]


@by_page
def test_specs_take_what_the_documentation_gives_them(page, capsys, monkeypatch):
    """Every override of a command that is shown names a field and has a value that it can take."""
    monkeypatch.chdir(ROOT)
    for words in specs_in(page):
        known = [word for word in words if not word.startswith("--")]
        assert main([*known, "--print-spec"]) == 0, (words, capsys.readouterr().err)


def test_commands_with_specs_are_found():
    """Otherwise the test above could not fail."""
    assert len(specs_in(ROOT / "README.md")) > 10
