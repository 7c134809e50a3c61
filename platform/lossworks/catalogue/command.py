"""``lossworks losses``: the catalogue as a table, one entry in full, or its picture."""

import argparse
import json
from pathlib import Path

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.registry import declarations
from lossworks.catalogue.text import case_text, search_text, value_text, without_logits
from lossworks.cli import Command, require_one
from lossworks.errors import UserError

_LEGEND = (
    "z: logits of a row · y: its label · K: classes · p: softmax · lse: logsumexp · "
    "products: matrix products E·Cᵀ of loss and gradients (cross-entropy: 3)"
)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("entry", nargs="?", metavar="NAME", help="print one entry in full")
    parser.add_argument("--json", action="store_true", help="print the declarations as JSON")
    parser.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw the loss and its gradient against the margin as a PNG; default NAME.png here",
    )


def _run(arguments: argparse.Namespace) -> int:
    known = declarations()
    if arguments.entry is None and arguments.plot is not None:
        raise UserError("--plot: name the loss to draw, as in `lossworks losses ldr --plot`")
    chosen = (
        list(known.values())
        if arguments.entry is None
        else [known[require_one(arguments.entry, list(known), "loss")]]
    )
    if arguments.json:
        print(json.dumps([entry.to_json() for entry in chosen], indent=1, ensure_ascii=False))
    elif arguments.entry is None:
        _print_table(chosen)
    else:
        _print_entry(chosen[0])
    if arguments.plot is not None:
        from lossworks.losses.drawing import draw_loss

        path = Path(arguments.plot or f"{arguments.entry}.png")
        print(f"\ndrawn: {draw_loss(arguments.entry, path)}")
    return 0


def _print_table(entries: list[Declaration]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("entry", no_wrap=True, style="bold")
    table.add_column("kind", no_wrap=True)
    table.add_column("without logits", no_wrap=True)
    table.add_column("hyperparameters", no_wrap=True)
    table.add_column("paper")
    for entry in entries:
        names = "\n".join(f"{p.name}={value_text(p.default)}" for p in entry.hyperparameters)
        paper = f"{entry.paper.authors} {entry.paper.year}"
        table.add_row(entry.slug, entry.kind, without_logits(entry), names or "–", paper)
    console = Console()
    console.print(table)
    console.print(_LEGEND, style="dim", highlight=False)
    console.print("`lossworks losses NAME` says more of one.", style="dim", highlight=False)


def _print_entry(entry: Declaration) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{entry.slug}[/]  {entry.kind}: {escape(entry.title)}\n", highlight=False)
    console.print(f"  {escape(entry.formula)}\n", highlight=False)
    console.print(f"{escape(str(entry.paper))}", highlight=False)
    console.print(f"Without logits: {without_logits(entry)}", highlight=False)
    for case in entry.cases:
        console.print(f"Equals {escape(case_text(case))}", highlight=False)
    if entry.invariances:
        console.print(f"Unchanged by a {' and a '.join(entry.invariances)} of the logits", highlight=False)
    for what, names in (("Needs", entry.requires), ("Flags", entry.flags)):
        if names:
            console.print(f"{what}: {', '.join(names)}", highlight=False)
    if entry.hyperparameters:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("hyperparameter", "default", "allowed", "searched", "meaning"):
            table.add_column(name, no_wrap=name in ("hyperparameter", "default"))
        for p in entry.hyperparameters:
            cells = (p.name, value_text(p.default), p.allowed, search_text(p), p.meaning)
            table.add_row(*map(escape, cells))
        console.print(table)


LOSSES = Command("the catalogue of losses: a table, or one entry in full", _configure, _run)
