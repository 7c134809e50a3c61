"""``lossworks losses``, ``methods`` and ``analyses``: a section of the catalogue as a table, or one entry."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from lossworks.catalogue.registry import SECTIONS, declaration, declarations, refused
from lossworks.cli import Command
from lossworks.errors import UserError

_LEGEND = (
    "z: logits of a row · y: its label · K: classes · p: softmax · lse: logsumexp · "
    "products: matrix products E·Cᵀ of loss and gradients (cross-entropy: 3)"
)


def _configured(section: str) -> Callable[[argparse.ArgumentParser], None]:
    def configure(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("entry", nargs="?", metavar="NAME", help=f"print one {SECTIONS[section]} in full")
        parser.add_argument("--json", action="store_true", help="print the declarations as JSON")

    return configure


def _configure_losses(parser: argparse.ArgumentParser) -> None:
    _configured("losses")(parser)
    parser.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw the loss and its gradient against the margin as a PNG; default NAME.png here",
    )


def _printing(section: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        known = declarations(section)
        chosen = list(known.values()) if arguments.entry is None else [declaration(arguments.entry, section)]
        if arguments.json:
            print(json.dumps([entry.to_json() for entry in chosen], indent=1, ensure_ascii=False))
            return 0
        from lossworks.catalogue.tables import print_in_full, print_overview

        if arguments.entry is not None:
            print_in_full(chosen[0])
            return 0
        notes = [f"`lossworks {section} NAME` says more of one."]
        notes += [f"Left out: {slug}: {reason}" for slug, reason in refused().items()]
        print_overview(chosen, [_LEGEND, *notes] if section == "losses" else notes)
        return 0

    return run


def _run_losses(arguments: argparse.Namespace) -> int:
    if arguments.entry is None and arguments.plot is not None:
        raise UserError("--plot: name the loss to draw, as in `lossworks losses ldr --plot`")
    status = _printing("losses")(arguments)
    if arguments.plot is not None:
        from lossworks.losses.drawing import draw_loss

        path = Path(arguments.plot or f"{arguments.entry}.png")
        print(f"\ndrawn: {draw_loss(arguments.entry, path)}")
    return status


LOSSES = Command(
    "the catalogue of losses: a table, or one of them in full",
    _configure_losses,
    _run_losses,
    group="the catalogue",
)
METHODS = Command(
    "training procedures of the catalogue: a table, or one of them in full",
    _configured("methods"),
    _printing("methods"),
    group="the catalogue",
)
ANALYSES = Command(
    "analyses of something trained: a table, or one of them in full",
    _configured("analyses"),
    _printing("analyses"),
    group="the catalogue",
)
