"""``lossworks check LOSS``: an audit of any loss, with a report."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lossworks.cli import Command
from lossworks.errors import UserError
from lossworks.specs.yaml_text import read_settings

if TYPE_CHECKING:
    from lossworks.losses.audits.subject import AuditFinding

_MARKS = {True: "[green]passed[/]", False: "[red]failed[/]", None: "[dim]–[/]"}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "loss",
        nargs="?",
        metavar="LOSS",
        help="an entry of the catalogue, or module:Class of an installed package",
    )
    parser.add_argument("overrides", nargs="*", metavar="hyperparameter=value", help="as in a spec")
    parser.add_argument("--all", action="store_true", help="audit every loss of the catalogue")
    parser.add_argument("--json", metavar="FILE", help="write the findings there too")
    parser.add_argument("--one-process", action="store_true", help="leave out the check on two ranks")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.all != (arguments.loss is None):
        raise UserError("check: name one loss, or give --all")
    if arguments.json and not Path(arguments.json).parent.is_dir():
        raise UserError(f"--json {arguments.json}: is no file in an existing folder")
    findings = _audit_all(arguments) if arguments.all else {arguments.loss: _audit_one(arguments)}
    every = [finding for of_one in findings.values() for finding in of_one]
    failed = [finding for finding in every if finding.passed is False]
    print(f"{len(every) - len(failed)} of {len(every)} checks hold")
    if arguments.json:
        plain = {name: [asdict(finding) for finding in of_one] for name, of_one in findings.items()}
        text = json.dumps(plain if arguments.all else plain[arguments.loss], indent=1)
        Path(arguments.json).write_text(text, encoding="utf-8")
    return 1 if failed else 0


def _audit_one(arguments: argparse.Namespace) -> "list[AuditFinding]":
    """Audit a loss and print each check with its figure."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lossworks.losses.audits.audit import audit
    from lossworks.losses.audits.subject import subject_of

    subject = subject_of(arguments.loss, read_settings(arguments.overrides))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"audit of {arguments.loss}", title_justify="left")
    for name in ("check", "", "figure"):
        table.add_column(name)
    findings: list[AuditFinding] = []
    with Console(stderr=True).status("auditing"):
        for finding in audit(subject, ranks=not arguments.one_process):
            findings.append(finding)
            table.add_row(finding.check, _MARKS[finding.passed], escape(finding.detail))
    Console().print(table)
    return findings


def _audit_all(arguments: argparse.Namespace) -> "dict[str, list[AuditFinding]]":
    """Audit the catalogue and print a line a loss, with what failed below."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lossworks.catalogue.registry import declarations
    from lossworks.losses.audits.audit import audit
    from lossworks.losses.audits.subject import subject_of

    findings: dict[str, list[AuditFinding]] = {}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="audit of the catalogue", title_justify="left")
    slugs = list(declarations("losses"))
    table.add_column("loss", no_wrap=True, min_width=max(map(len, slugs)))
    for name in ("hold", "not for it", "failed"):
        table.add_column(name, overflow="fold")
    console = Console(stderr=True)
    with console.status("auditing") as status:
        for slug in slugs:
            status.update(f"auditing {slug}")
            found = list(audit(subject_of(slug, {}), ranks=not arguments.one_process))
            findings[slug] = found
            counts = [sum(one.passed is verdict for one in found) for verdict in (True, None)]
            failed = "; ".join(f"{one.check}: {one.detail}" for one in found if one.passed is False)
            table.add_row(slug, *map(str, counts), escape(failed) or "–")
    Console().print(table)
    return findings


CHECK = Command(
    "audit a loss: gradients, reductions, splits, extremes, precision, ranks",
    _configure,
    _run,
    group="the catalogue",
)
