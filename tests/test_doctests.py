"""The examples in docstrings run and give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("platform", "jobs", "tune", "federated")
MODULES = [
    ".".join(file.relative_to(ROOT / room).with_suffix("").parts).removesuffix(".__init__")
    for room in ROOMS
    for file in sorted((ROOT / room).rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    """With the names of the module that holds them, as a reader would run them after importing it."""
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)

    assert found.attempted > 0
    assert found.failed == 0


def test_examples_are_found():
    """The public functions of the head have some."""
    assert {"lossworks.head.cross_entropy", "lossworks.head.row_statistics"} <= set(MODULES)
