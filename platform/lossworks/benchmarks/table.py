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
    """Print the figures, one table a case."""
    from rich.console import Console
    from rich.table import Table

    for case in dict.fromkeys(row.case for row in rows):
        table = Table("method", "metric", "value", "unit", title=case, title_justify="left")
        table.columns[2].justify = "right"
        for row in rows:
            if row.case == case:
                table.add_row(row.method, row.metric, f"{row.value:,.4g}", row.unit)
        Console().print(table)
