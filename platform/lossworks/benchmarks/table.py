"""The one shape of every benchmark's result."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark.

    Attributes:
        case: What was computed: shapes, corpus, workers.
        method: Which of the compared ways.
        metric: What was measured.
        value: The figure.
        unit: Its unit; ``x`` for a ratio.
    """

    case: str
    method: str
    metric: str
    value: float
    unit: str


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write ``{"machine": {...}, "rows": [...]}``, the shape that all benchmarks share."""
    from lossworks.tracking import machine

    path.write_text(
        json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )


def print_rows(rows: Sequence[Row]) -> None:
    """Print the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "method", "metric", "value", "unit")
    for row in rows:
        table.add_row(row.case, row.method, row.metric, f"{row.value:,.3f}", row.unit)
    Console().print(table)
