"""``lossworks bench WHAT``: finds the benchmarks of the rooms through entry points."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from lossworks.benchmarks.table import Row, print_rows, write_rows
from lossworks.cli import Command, require_one
from lossworks.errors import UserError

_GROUP = "lossworks.benchmarks"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a room.

    Attributes:
        help: What is compared, in one line.
        run: Takes ``key=value`` overrides and how often to repeat, and returns the figures.
        repeats: How often to repeat unless the user says.
        draw: Takes the figures and a path, and draws them there as a PNG; None if there is no chart.
    """

    help: str
    run: Callable[[Sequence[str], int], list[Row]]
    repeats: int = 3
    draw: Callable[[Sequence[Row], Path], object] | None = None


def _configure(parser: argparse.ArgumentParser) -> None:
    points = sorted(entry_points(group=_GROUP), key=lambda point: point.name)
    parser.add_argument("what", metavar="WHAT", help=f"one of: {', '.join(point.name for point in points)}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="fields of the benchmark's spec"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help="times each method runs, in turns (default: 3, or what the benchmark needs)",
    )
    parser.add_argument("--device", help="short for device=DEVICE, in benchmarks that run on either")
    parser.add_argument("--json", metavar="FILE", help="write machine and figures there too")
    parser.add_argument(
        "--chart", metavar="FILE", help="draw the figures there as a PNG, if the benchmark can"
    )


def _run(arguments: argparse.Namespace) -> int:
    points = {point.name: point for point in entry_points(group=_GROUP)}
    benchmark: Benchmark = points[require_one(arguments.what, sorted(points), "benchmark")].load()
    if arguments.chart and benchmark.draw is None:
        raise UserError(f"--chart {arguments.chart}: the benchmark {arguments.what} has no chart")
    for path in filter(None, (arguments.json, arguments.chart)):
        _require_folder(Path(path))
    repeats = benchmark.repeats if arguments.repeats is None else max(1, arguments.repeats)
    device = [f"device={arguments.device}"] if arguments.device else []
    rows = benchmark.run([*arguments.overrides, *device], repeats)
    print_rows(rows)
    if arguments.json:
        write_rows(rows, Path(arguments.json))
    if arguments.chart and benchmark.draw is not None:
        benchmark.draw(rows, Path(arguments.chart))
    return 0


def _require_folder(path: Path) -> None:
    """Refuse a file that can't be written before the benchmark has run for an hour."""
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"{path}: is no file in an existing folder")


BENCH = Command("measure speed and memory side by side with the alternatives", _configure, _run)
