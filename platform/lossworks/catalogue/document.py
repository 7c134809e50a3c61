"""Writes ``catalogue.json`` and ``docs/losses.md`` from the declarations.

``python -m lossworks.catalogue.document``, after an entry was added or its declaration changed.
"""

import json
import pkgutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from lossworks import entries
from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.entry import Entry
from lossworks.catalogue.registry import FILE
from lossworks.catalogue.text import facts, run_text, search_text, value_text, without_logits

DOCS = Path(__file__).parents[3] / "docs"
PAGE = DOCS / "losses.md"
_HEAD = """# The catalogue

Written from the declarations by `python -m lossworks.catalogue.document`; `lossworks losses NAME`,
`lossworks methods NAME` and `lossworks analyses NAME` print the same, and `lossworks losses NAME --plot`
draws it. In the formulas z are the logits of a row, y its label, K the number of classes, p the softmax, lse
the logsumexp. "Without logits" says whether the loss can train a linear head that never builds them, and how
many matrix products E·Cᵀ loss and gradients take then (plain cross-entropy: 3).

[Losses](#losses) · [Methods](#methods) · [Analyses](#analyses)
"""
_SECTIONS = {"losses": "Losses", "methods": "Methods", "analyses": "Analyses"}


def found(package: ModuleType) -> list[Declaration]:
    """Return the declarations of all classes in a package's modules, by slug."""
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        import_module(module.name)
    own = [kind for kind in _subclasses(Entry) if kind.slug and kind.__module__.startswith(package.__name__)]
    return sorted((kind.declaration() for kind in own), key=lambda entry: entry.slug)


def _subclasses(kind: type[Entry]) -> set[type[Entry]]:
    return set(kind.__subclasses__()).union(*(_subclasses(child) for child in kind.__subclasses__()))


def catalogue_text(declarations: Sequence[Declaration]) -> str:
    """Return the content of a catalogue's JSON file."""
    return json.dumps([entry.to_json() for entry in declarations], indent=1, ensure_ascii=False) + "\n"


def page_text(declarations: Sequence[Declaration]) -> str:
    """Return the content of ``docs/losses.md``."""
    parts = [_HEAD.rstrip("\n")]
    for section, title in _SECTIONS.items():
        parts.append(section_text(title, [entry for entry in declarations if entry.section == section]))
    return "\n\n".join(parts) + "\n"


def section_text(title: str, declarations: Sequence[Declaration]) -> str:
    """Return a section of a page: a table of entries, and each in full."""
    costs = any(entry.without_logits for entry in declarations)
    headings = ["entry", "kind", "what it is", *(["without logits"] if costs else [])]
    lines = [f"## {title}", "", _row(headings), _row(["---"] * len(headings))]
    for entry in declarations:
        cost = [without_logits(entry)] if costs else []
        lines.append(_row([f"[{entry.slug}](#{entry.slug})", entry.kind, entry.title, *cost]))
    for entry in declarations:
        lines += ["", *_entry_lines(entry)]
    return "\n".join(lines)


def _entry_lines(entry: Declaration) -> list[str]:
    lines = [f"### {entry.slug}", "", f"{entry.title}.", "", f"    {entry.formula}", ""]
    lines += facts(entry)
    lines += ["", f"    {entry.example}"] if entry.example else [f"{run_text(entry)}."]
    if entry.hyperparameters:
        headings = ["hyperparameter", "default", "allowed", "searched", "meaning"]
        lines += ["", _row(headings), _row(["---"] * len(headings))]
        lines += [
            _row([f"`{p.name}`", value_text(p.default), p.allowed, search_text(p), p.meaning])
            for p in entry.hyperparameters
        ]
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main() -> None:
    """Write both files."""
    declarations = found(entries)
    FILE.write_text(catalogue_text(declarations), encoding="utf-8")
    if DOCS.is_dir():
        PAGE.write_text(page_text(declarations), encoding="utf-8")
    print(f"{len(declarations)} entries")


if __name__ == "__main__":
    main()
