"""``lossworks analyse NAME WHAT…``: an analysis of a trained model, or of several runs together."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lossworks.cli import Command
from lossworks.errors import UserError

if TYPE_CHECKING:
    from lossworks.tasks.analyses import Finding


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("analysis", nargs="?", metavar="NAME", help="of the analysis; none lists all")
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help="runs (id, name or folder) and hyperparameter=value"
    )
    parser.add_argument("--to", metavar="DIR", help="folder of figures and picture; default: the first run's")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.analysis is None:
        from lossworks.catalogue.command import ANALYSES

        return ANALYSES.run(argparse.Namespace(entry=None, json=False, plot=None))
    from lossworks.runs import RunFolder
    from lossworks.training.analysing import analyse

    names = [text for text in arguments.what if "=" not in text]
    settings = dict(_setting(text) for text in arguments.what if "=" in text)
    if not names:
        raise UserError(f"analyse {arguments.analysis}: name at least one run")
    folders = [RunFolder.find(name) for name in names]
    done = analyse(arguments.analysis, folders, settings, to=arguments.to and Path(arguments.to))
    _show(arguments.analysis, done.finding)
    for path in done.files:
        print(path)
    if done.complaint:
        print(f"lossworks: {done.complaint}", file=sys.stderr)
    return 0


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{text!r}: the value is not valid YAML") from None


def _show(name: str, finding: "Finding") -> None:
    from lossworks.reporting import print_summary

    print_summary(name, [(figure, f"{value:.6g}") for figure, value in finding.figures.items()])


ANALYSE = Command("analyse a trained model, or compare runs", _configure, _run)
