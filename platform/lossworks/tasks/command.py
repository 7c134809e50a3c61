"""``lossworks tasks``: the kinds of training, or one in full."""

import argparse
from typing import TYPE_CHECKING

from lossworks.cli import Command

if TYPE_CHECKING:
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


TASKS = Command("the kinds of training: what each takes and measures", _configure, _run)
