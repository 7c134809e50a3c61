"""Writes ``catalogue.json`` and ``docs/losses.md`` from the declarations.

``python -m lossworks.catalogue.document``, after an entry was added or its declaration changed.
"""

import json
import pkgutil
from importlib import import_module
from pathlib import Path

from lossworks import entries
from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.registry import FILE
from lossworks.catalogue.text import case_text, search_text, value_text, without_logits
from lossworks.losses.interface import Entry

PAGE = Path(__file__).parents[3] / "docs" / "losses.md"
_HEAD = """# The catalogue

Written from the declarations by `python -m lossworks.catalogue.document`; `lossworks losses NAME` prints the
same, and `lossworks losses NAME --plot` draws it. In the formulas z are the logits of a row, y its label, K
the number of classes, p the softmax, lse the logsumexp. "Without logits" says whether the loss can train a
linear head that never builds them, and how many matrix products E·Cᵀ loss and gradients take then (plain
cross-entropy: 3).
"""


def found() -> list[Declaration]:
    """Return the declarations of all classes in the entries' modules, by slug."""
    for module in pkgutil.walk_packages(entries.__path__, f"{entries.__name__}."):
        import_module(module.name)
    return sorted((kind.declaration() for kind in _subclasses(Entry)), key=lambda entry: entry.slug)


def _subclasses(kind: type[Entry]) -> set[type[Entry]]:
    below = set(kind.__subclasses__()).union(*(_subclasses(child) for child in kind.__subclasses__()))
    return {child for child in below if child.slug and child.__module__.startswith(entries.__name__)}


def catalogue_text(declarations: list[Declaration]) -> str:
    """Return the content of ``catalogue.json``."""
    return json.dumps([entry.to_json() for entry in declarations], indent=1, ensure_ascii=False) + "\n"


def page_text(declarations: list[Declaration]) -> str:
    """Return the content of ``docs/losses.md``."""
    lines = [_HEAD, "| entry | kind | what it is | without logits |", "| --- | --- | --- | --- |"]
    lines += [f"| [{e.slug}](#{e.slug}) | {e.kind} | {e.title} | {without_logits(e)} |" for e in declarations]
    for entry in declarations:
        lines += ["", *_section(entry)]
    return "\n".join(lines) + "\n"


def _section(entry: Declaration) -> list[str]:
    lines = [f"## {entry.slug}", "", f"{entry.title}.", "", f"    {entry.formula}", "", f"{entry.paper}."]
    lines += [f"Equals {case_text(case)}." for case in entry.cases]
    if entry.invariances:
        lines.append(f"Unchanged by a {' and a '.join(entry.invariances)} of the logits.")
    if entry.requires:
        lines.append(f"Needs the inputs: {', '.join(entry.requires)}.")
    if entry.hyperparameters:
        lines += [
            "",
            "| hyperparameter | default | allowed | searched | meaning |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| `{p.name}` | {value_text(p.default)} | {p.allowed} | {search_text(p)} | {p.meaning} |"
            for p in entry.hyperparameters
        ]
    return lines


def main() -> None:
    """Write both files."""
    declarations = found()
    FILE.write_text(catalogue_text(declarations), encoding="utf-8")
    if PAGE.parent.is_dir():
        PAGE.write_text(page_text(declarations), encoding="utf-8")
    print(f"{len(declarations)} entries")


if __name__ == "__main__":
    main()
