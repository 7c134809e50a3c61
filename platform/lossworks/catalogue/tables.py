"""Declarations as tables on a terminal of any width; names are never cut, text is folded."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lossworks.catalogue.declaration import Declaration, Hyperparameter
from lossworks.catalogue.text import facts, run_text, search_text, value_text, without_logits

_WIDE = 140  # columns from which every fact of an entry has a column of its own
_TEXT = 24  # columns that folded text needs at least


def print_overview(entries: Sequence[Declaration], notes: Sequence[str]) -> None:
    """Print a table of entries, and notes below it."""
    console = _console([entry.slug for entry in entries])
    console.print(_wide(entries) if console.width >= _WIDE else _narrow(entries))
    for note in notes:
        console.print(Text(note, "dim"))


def print_in_full(entry: Declaration) -> None:
    """Print all that an entry declares."""
    console = _console([f"{p.name}={value_text(p.default)}" for p in entry.hyperparameters])
    console.print(Text.assemble((entry.slug, "bold"), f"  {entry.kind}: {entry.title}\n"))
    console.print(Padding(Text(entry.formula), (0, 0, 1, 2)))
    for fact in facts(entry):
        console.print(Text(fact))
    console.print(Text(run_text(entry)))
    if entry.hyperparameters:
        console.print(_hyperparameters(entry.hyperparameters))


def _console(names: Sequence[str]) -> Console:
    """Return a console that is wide enough for the longest name beside folded text."""
    console = Console(highlight=False)
    return Console(highlight=False, width=max(console.width, _longest(names) + 2 + _TEXT))


def _longest(names: Sequence[str]) -> int:
    return max((len(name) for name in names), default=0)


def _table(names: dict[str, int], texts: Sequence[str], *, leading: int = 0) -> Table:
    """Return an empty table: columns of names, with their widths, and of text."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, leading=leading)
    for heading, width in names.items():
        table.add_column(heading, no_wrap=True, min_width=width)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    return table


def _wide(entries: Sequence[Declaration]) -> Table:
    rows = [
        (entry.title, _settings(entry), without_logits(entry), f"{entry.paper.authors} {entry.paper.year}")
        for entry in entries
    ]
    headings = ("what it is", "hyperparameters", "without logits", "paper")
    # A column that says nothing of any of them is left out.
    shown = [index for index in range(len(headings)) if any(row[index] != "–" for row in rows)]
    names = {
        "entry": _longest([entry.slug for entry in entries]),
        "kind": _longest([entry.kind for entry in entries]),
    }
    table = _table(names, [headings[index] for index in shown])
    for entry, row in zip(entries, rows, strict=True):
        table.add_row(Text(entry.slug, "bold"), entry.kind, *(Text(row[index]) for index in shown))
    return table


def _narrow(entries: Sequence[Declaration]) -> Table:
    table = _table({"entry": _longest([entry.slug for entry in entries])}, ["what it is"], leading=1)
    for entry in entries:
        details = [_settings(entry), f"{entry.paper.authors} {entry.paper.year}"]
        if entry.without_logits:
            details.insert(1, f"without logits: {without_logits(entry)}")
        below = "\n".join(detail for detail in details if detail != "–")
        name = Text.assemble((entry.slug, "bold"), "\n", (entry.kind, "dim"))
        table.add_row(name, Text.assemble(entry.title, "\n", (below, "dim")))
    return table


def _hyperparameters(parameters: Sequence[Hyperparameter]) -> RenderableType:
    names = [f"{p.name}={value_text(p.default)}" for p in parameters]
    table = _table({"hyperparameter": _longest(names)}, ["meaning"])
    for name, p in zip(names, parameters, strict=True):
        searched = f"; searched: {search_text(p)}" if p.search else ""
        table.add_row(name, Text.assemble(p.meaning, "\n", (p.allowed + searched, "dim")))
    return table


def _settings(entry: Declaration) -> str:
    return ", ".join(f"{p.name}={value_text(p.default)}" for p in entry.hyperparameters) or "–"
