"""``lossworks doctor``: all checks, as a table."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lossworks.cli import Command
from lossworks.errors import UserError
from lossworks_jobs.clusters.local_nodes import use_token
from lossworks_jobs.doctor.check import Check

if TYPE_CHECKING:
    from rich.console import Console

_MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "wrong": "[bold red]wrong[/]"}
_WIDTH_OF_FILES = 140


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status 1 if anything is wrong, 0 otherwise. Nothing is started or changed."
    parser.add_argument("--address", help="Ray cluster or job server to look at; default: $RAY_ADDRESS")
    parser.add_argument("--uri", help="MLflow store to look at; default: the embedded one")
    parser.add_argument("--json", metavar="FILE", help="write the checks there too")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: its folder doesn't exist")
    if arguments.address:
        use_token(arguments.address)
    checks = diagnose(arguments.address, arguments.uri)
    if arguments.json:
        rows = [asdict(check) for check in checks]
        Path(arguments.json).write_text(f"{json.dumps(rows, indent=1)}\n", encoding="utf-8")
    print_checks(checks)
    return int(any(check.status == "wrong" for check in checks))


def diagnose(address: str | None = None, uri: str | None = None) -> list[Check]:
    """Return all checks; the servers are asked while the machine is looked at.

    Args:
        address: A Ray cluster or job server; RAY_ADDRESS or none if unset.
        uri: An MLflow store; the embedded one if unset.
    """
    from lossworks_jobs.doctor import servers

    with ThreadPoolExecutor(2) as pool:
        ray = pool.submit(servers.ray_checks, address)
        local = list(_local())
        return [*local, *ray.result(), servers.tracking_store(uri)]


def _local() -> Iterator[Check]:
    from lossworks_jobs.doctor import computing, files, installation, machine

    checks: Sequence[Callable[[], Check | list[Check]]] = (
        installation.python_version, installation.packages, installation.extras,
        computing.cores, computing.vector_units, computing.torch_build, computing.gpus,
        computing.triton_targets, computing.cpp_compiler,
        machine.memory, machine.shared_memory, machine.disks, machine.open_files, machine.home_folder,
        machine.usage_reports, files.secrets,
    )  # fmt: skip
    for check in checks:
        found = check()
        yield from found if isinstance(found, list) else [found]


def print_checks(checks: Sequence[Check], console: "Console | None" = None) -> None:
    """Print a table with one line a check and its fix below, and how many are not well."""
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    console.print(_table(checks))
    counts = {status: sum(check.status == status for check in checks) for status in _MARKS}
    console.print(", ".join(f"{counts[status]} {mark}" for status, mark in _MARKS.items()), highlight=False)


def _table(checks: Sequence[Check]):  # type: ignore[no-untyped-def]
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    area = ""
    for check in checks:  # Text takes brackets as they are; rich would read "[jobs]" as markup
        found = Text(check.found)
        if check.fix:
            found.append(f"\n→ {check.fix}", "cyan")
        table.add_row(check.area if check.area != area else "", Text(check.name), _MARKS[check.status], found)
        area = check.area
    return table


DOCTOR = Command(
    "check this machine, its installation and its servers", _configure, _run, group="machines and servers"
)
