"""``lossworks tasks``: the kinds of training; ``lossworks analyse``: an analysis of what was trained."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lossworks.cli import Command
from lossworks.errors import UserError
from lossworks.specs.yaml_text import read_settings

if TYPE_CHECKING:
    from lossworks.tasks.analyses import Finding
    from lossworks.tasks.interface import Task


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", metavar="NAME", help="print one task in full")


def _run(arguments: argparse.Namespace) -> int:
    from lossworks.tasks.registry import task_class, usable_tasks

    if arguments.task is not None:
        _print_task(task_class(arguments.task))
        return 0
    _print_tasks(*usable_tasks())
    return 0


def _print_tasks(tasks: "list[type[Task]]", refused: dict[str, str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", no_wrap=True, style="bold")
    for name in ("trains", "losses", "measures"):
        table.add_column(name, overflow="fold")
    for task in tasks:
        measures = ", ".join(name.removeprefix("eval/") for name in task.yardsticks)
        table.add_row(task.slug, task.title, str(len(losses_of(task))), measures)
    console = Console()
    console.print(table)
    for reason in refused.values():
        console.print(f"Left out: {reason}", style="yellow", highlight=False, markup=False)
    console.print("`lossworks tasks NAME` says what one takes and measures.", style="dim", highlight=False)


def losses_of(task: "type[Task]") -> list[str]:
    """Return the slugs of the losses that can train a task, in some run of it."""
    from lossworks.catalogue.registry import declarations

    return [slug for slug, entry in declarations("losses").items() if task.takes(entry)]


def _print_task(task: "type[Task]") -> None:
    from rich.console import Console

    from lossworks.catalogue.registry import declarations
    from lossworks.data.batch import NAMES
    from lossworks.specs.base import field_paths

    console = Console(highlight=False)
    console.print(f"[bold]{task.slug}[/]: trains {task.title}\n")
    console.print(f"Losses: {', '.join(losses_of(task))}.")
    for slug in losses_of(task):
        if condition := task.condition(declarations("losses")[slug]):
            console.print(f"  {condition}.")
    console.print("\nYardsticks, whatever loss trains:")
    for name, mode in task.yardsticks.items():
        console.print(f"  {name}  {'smaller' if mode == 'min' else 'larger'} is better")
    console.print("\nA batch can hold:")
    for name in task.provides:
        console.print(f"  {name} {NAMES[name].axes}: {NAMES[name].meaning}", markup=False)
    console.print("\nFields of data and model:")
    for path in field_paths(task.spec):
        if path.startswith(("data.", "model.")):
            console.print(f"  {path}")


TASKS = Command(
    "the kinds of training: what each takes and measures", _configure, _run, group="the catalogue"
)


def _configure_analyse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("analysis", nargs="?", metavar="NAME", help="of the analysis; none lists all")
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help="runs (id, name or folder) and hyperparameter=value"
    )
    parser.add_argument("--to", metavar="DIR", help="folder of figures and picture; default: the first run's")


def _run_analyse(arguments: argparse.Namespace) -> int:
    if arguments.analysis is None:
        from lossworks.catalogue.command import ANALYSES

        return ANALYSES.run(argparse.Namespace(entry=None, json=False, plot=None))
    from lossworks.runs import RunFolder
    from lossworks.training.analysing import analyse

    names = [text for text in arguments.what if "=" not in text]
    settings = read_settings([text for text in arguments.what if "=" in text])
    if not names:
        raise UserError(f"analyse {arguments.analysis}: name at least one run")
    folders = [RunFolder.find(name) for name in names]
    done = analyse(arguments.analysis, folders, settings, to=arguments.to and Path(arguments.to))
    _show(arguments.analysis, done.finding)
    for note in done.finding.notes:
        print(note)
    for path in done.files:
        print(path)
    if done.complaint:
        print(f"lossworks: {done.complaint}", file=sys.stderr)
    return 0


def _show(name: str, finding: "Finding") -> None:
    from lossworks.reporting import print_summary

    print_summary(name, [(figure, f"{value:.6g}") for figure, value in finding.figures.items()])


ANALYSE = Command("analyse a trained model, or compare runs", _configure_analyse, _run_analyse)
