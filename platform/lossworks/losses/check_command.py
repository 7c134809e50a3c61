"""``lossworks check LOSS``: an audit of any loss, with a report."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lossworks.cli import Command
from lossworks.errors import UserError

if TYPE_CHECKING:
    from lossworks.losses.audit import Finding

_MARKS = {True: "[green]passed[/]", False: "[red]failed[/]", None: "[dim]–[/]"}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "loss", metavar="LOSS", help="an entry of the catalogue, or module:Class of an installed package"
    )
    parser.add_argument("overrides", nargs="*", metavar="hyperparameter=value", help="as in a spec")
    parser.add_argument("--json", metavar="FILE", help="write the findings there too")
    parser.add_argument("--one-process", action="store_true", help="leave out the check on two ranks")


def _run(arguments: argparse.Namespace) -> int:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lossworks.losses.audit import audit, subject_of

    subject = subject_of(arguments.loss, _hyperparameters(arguments.overrides))
    if arguments.json and not Path(arguments.json).parent.is_dir():
        raise UserError(f"--json {arguments.json}: is no file in an existing folder")
    console = Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"audit of {arguments.loss}", title_justify="left")
    for name in ("check", "", "figure"):
        table.add_column(name)
    findings: list[Finding] = []
    with Console(stderr=True).status("auditing"):
        for finding in audit(subject, ranks=not arguments.one_process):
            findings.append(finding)
            table.add_row(finding.check, _MARKS[finding.passed], escape(finding.detail))
    console.print(table)
    failed = [finding for finding in findings if finding.passed is False]
    console.print(f"{len(findings) - len(failed)} of {len(findings)} checks hold", highlight=False)
    if arguments.json:
        text = json.dumps([asdict(finding) for finding in findings], indent=1)
        Path(arguments.json).write_text(text, encoding="utf-8")
    return 1 if failed else 0


def _hyperparameters(overrides: list[str]) -> dict[str, object]:
    pairs = [text.partition("=") for text in overrides]
    for name, equals, _ in pairs:
        if not equals:
            raise UserError(f"override {name!r}: write it as hyperparameter=value")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


CHECK = Command("audit a loss: gradients, reductions, splits, extremes, precision, ranks", _configure, _run)
