"""The one shape of every benchmark's result."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from lossworks.errors import UserError
from lossworks.files import write_atomically

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH_OF_FILES = 140
_WIDTH_OF_HEADERS = 10


@dataclass(frozen=True)
class BenchmarkRow:
    """One figure of a benchmark.

    Attributes:
        case: What was computed: shapes, corpus, workers.
        method: Which of the compared ways.
        metric: What was measured.
        value: The figure; None where there is none, and ``note`` says why.
        unit: Its unit; ``x`` for a ratio.
        note: What a reader must know about this figure; usually nothing.
    """

    case: str
    method: str
    metric: str
    value: float | None
    unit: str
    note: str = ""


def write_rows(rows: Sequence[BenchmarkRow], path: Path) -> None:
    """Write ``{"machine": {...}, "rows": [...]}``, the shape that all benchmarks share."""
    text = json.dumps({"machine": _machine(), "rows": [_as_dict(row) for row in rows]}, indent=1)
    write_atomically(path, f"{text}\n")  # never half a file: the benchmark goes on meanwhile


@cache
def _machine() -> dict[str, Any]:
    """Return what this machine is, asked once: figures are written as they come."""
    from lossworks.tracking import machine

    return machine()


def read_benchmark(path: Path) -> list[BenchmarkRow]:
    """Return the figures that ``write_rows`` wrote.

    Raises:
        UserError: The file holds something else.
    """
    try:
        return [BenchmarkRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no figures of a benchmark: {error}") from None


def print_rows(rows: Sequence[BenchmarkRow]) -> None:
    """Print the figures, one table a case: a line for each method, a column for each metric."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        if any(row.value is not None for row in of_case):
            console.print(_table(case, of_case))
        else:
            console.print(case, style="italic")
        for row in of_case:
            if row.note:
                console.print(f"{row.method}: {row.metric}: {row.note}", markup=False, highlight=False)
        console.print()


def _table(case: str, rows: Sequence[BenchmarkRow]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    figures = {(row.method, row.metric, row.unit): row.value for row in rows if row.value is not None}
    methods = dict.fromkeys(method for method, _, _ in figures)
    columns = dict.fromkeys((metric, unit) for _, metric, unit in figures)
    table = Table(title=case, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    for metric, unit in columns:
        table.add_column(_header(metric, unit), justify="right", no_wrap=True)
    for method in methods:
        table.add_row(method, *(_figure(figures.get((method, *column))) for column in columns))
    return table


def _header(metric: str, unit: str) -> str:
    from rich.markup import escape

    shown = metric.replace("_", " "), unit
    words, units = (wrap(text.replace("+", " + "), _WIDTH_OF_HEADERS) for text in shown)
    return "\n".join([*words, *(f"[dim]{escape(line)}[/]" for line in units)])


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _as_dict(row: BenchmarkRow) -> dict[str, Any]:
    values = asdict(row)
    if not row.note:
        del values["note"]
    return values
