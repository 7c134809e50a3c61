"""A public name means one thing in the whole project, and a docstring says it in a sentence."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("platform", "jobs", "tune", "federated")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    """Yield every module of the packages, parsed."""
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            yield file, ast.parse(file.read_text(encoding="utf-8"))


def types_in(tree: ast.Module) -> set[str]:
    """Return the public classes and names of types that a module defines at its top."""
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if name[0].isupper() and not name.isupper() and name != "_"}


def test_a_type_s_name_means_one_thing():
    """Whoever reads it in one room knows what it is in another."""
    places = defaultdict(list)
    for file, tree in trees():
        for name in types_in(tree):
            places[name].append(str(file.relative_to(ROOT)))
    shared = {name: files for name, files in places.items() if len(files) > 1}

    assert len(places) > 200
    assert shared == {}


def wordless(tree: ast.Module) -> Iterator[str]:
    """Yield the functions and classes whose docstring is a symbol or two instead of words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = (ast.get_docstring(node) or "A function without.").partition("\n")[0]
            if len(re.findall(r"[^\W\d_]{3,}", text)) < 2:
                yield f"{node.name}: {text}"


def test_docstrings_are_sentences():
    """A symbol of the paper is no description for those who don't have it at hand."""
    found = {str(file.relative_to(ROOT)): list(wordless(tree)) for file, tree in trees()}
    terse = {file: texts for file, texts in found.items() if texts}

    assert terse == {}
