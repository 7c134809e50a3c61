"""``lossworks bench WHAT``: finds the benchmarks of the rooms through entry points."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from lossworks.benchmarks.table import Row, print_rows, write_rows
from lossworks.cli import Command, require_one

_GROUP = "lossworks.benchmarks"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a room.

    Attributes:
        help: What is compared, in one line.
        run: Takes ``key=value`` overrides and how often to repeat, and returns the figures.
    """

    help: str
    run: Callable[[Sequence[str], int], list[Row]]


def _configure(parser: argparse.ArgumentParser) -> None:
    points = sorted(entry_points(group=_GROUP), key=lambda point: point.name)
    parser.add_argument("what", metavar="WHAT", help=f"one of: {', '.join(point.name for point in points)}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="fields of the benchmark's spec"
    )
    parser.add_argument("--repeats", type=int, default=3, help="times each method runs, in turns (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write machine and figures there too")


def _run(arguments: argparse.Namespace) -> int:
    points = {point.name: point for point in entry_points(group=_GROUP)}
    benchmark: Benchmark = points[require_one(arguments.what, sorted(points), "benchmark")].load()
    rows = benchmark.run(arguments.overrides, max(1, arguments.repeats))
    print_rows(rows)
    if arguments.json:
        write_rows(rows, Path(arguments.json))
    return 0


BENCH = Command("measure speed and memory side by side with the alternatives", _configure, _run)
