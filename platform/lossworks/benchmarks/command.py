"""``lossworks bench WHAT``: finds the benchmarks of the rooms through entry points."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from pydantic import BeforeValidator

from lossworks.benchmarks.table import BenchmarkRow, print_rows, read_benchmark, write_rows
from lossworks.cli import Command
from lossworks.errors import UserError, require_one

_GROUP = "lossworks.benchmarks"

# `methods=exact,dense` is easier to type in a shell than a list in brackets.
COMMAS = BeforeValidator(lambda value: str(value).split(",") if isinstance(value, str | int) else value)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a room.

    Attributes:
        help: What is compared, in one line.
        run: Takes ``key=value`` overrides and how often to repeat, and gives the figures as they come.
        repeats: How often to repeat unless the user says.
        draw: Takes the figures and a path, and draws them there as a PNG; None if there is no chart.
        go_on: Like ``run``, with figures of an earlier run that need not be measured again; None if it can't.
    """

    help: str
    run: Callable[[Sequence[str], int], Iterable[BenchmarkRow]]
    repeats: int = 3
    draw: Callable[[Sequence[BenchmarkRow], Path], object] | None = None
    go_on: Callable[[Sequence[str], int, Sequence[BenchmarkRow]], Iterable[BenchmarkRow]] | None = None


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
    parser.add_argument("--json", metavar="FILE", help="write machine and figures there, as they come")
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="measure only what is not in --json FILE yet, if the benchmark can",
    )
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
    rows: list[BenchmarkRow] = []
    for row in _measured(benchmark, [*arguments.overrides, *device], repeats, arguments):
        rows.append(row)
        if arguments.json:  # at once, since hours of measuring may be cut short
            write_rows(rows, Path(arguments.json))
    print_rows(rows)
    if arguments.json:
        write_rows(rows, Path(arguments.json))
    if arguments.chart and benchmark.draw is not None:
        benchmark.draw(rows, Path(arguments.chart))
    return 0


def _measured(
    benchmark: Benchmark, overrides: Sequence[str], repeats: int, arguments: argparse.Namespace
) -> Iterable[BenchmarkRow]:
    """Return the figures as they come, from an earlier run first if there is one to go on with."""
    if not arguments.go_on:
        return benchmark.run(overrides, repeats)
    if benchmark.go_on is None:
        raise UserError(f"--go-on: the benchmark {arguments.what} measures everything anew")
    if not arguments.json:
        raise UserError("--go-on: name the file to go on with as --json FILE")
    path = Path(arguments.json)
    return benchmark.go_on(overrides, repeats, read_benchmark(path) if path.is_file() else [])


def _require_folder(path: Path) -> None:
    """Refuse a file that can't be written before the benchmark has run for an hour."""
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"{path}: is no file in an existing folder")


BENCH = Command(
    "measure speed and memory side by side with the alternatives", _configure, _run, group="the catalogue"
)
