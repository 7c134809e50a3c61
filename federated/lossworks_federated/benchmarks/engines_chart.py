"""The chart of ``lossworks bench federated``."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lossworks.benchmarks.table import BenchmarkRow
from lossworks.reporting.picture_style import BLUE, GREY, ORANGE, STYLE, not_measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"cohort": BLUE, "loop": GREY, "flower": ORANGE, "pfl": "#6b8f3a"}
_CLIENTS = re.compile(r"(\d+) clients a round$")
_SIZES = re.compile(r"10 clients a round, (\d+)(k|M) parameters")


def draw_benchmark(rows: Sequence[BenchmarkRow], path: Path) -> Path:
    """Draw seconds a round as a PNG of 1800 × 600 pixels: the main cases, and both curves.

    Args:
        rows: Figures of the benchmark.
        path: File to write, in an existing folder.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    seconds = [row for row in rows if row.metric == "seconds_per_round" and row.value is not None]
    with rc_context(STYLE):
        figure = Figure(figsize=(18, 6), dpi=100, layout="constrained", facecolor="white")
        bars, clients, sizes = figure.subplots(1, 3)
        _draw_bars(bars, seconds, rows)
        _draw_curve(clients, seconds, _CLIENTS, "clients a round")
        clients.set_title("Clients a round, 10k parameters")
        _draw_curve(sizes, seconds, _SIZES, "parameters")
        sizes.set_title("Parameters, 10 clients a round")
        figure.savefig(path, format="png")
    return path


def _draw_bars(axes: "Axes", seconds: Sequence[BenchmarkRow], rows: Sequence[BenchmarkRow]) -> None:
    axes.set_title("Seconds a round, 20 of 100 clients")
    main = [row for row in seconds if row.case.endswith("-100-20")]
    if not main:
        not_measured(axes)
        return
    ratios = {(row.case, row.method): row.value for row in rows if row.metric == "over cohort"}
    cases = list(dict.fromkeys(row.case for row in main))
    methods = list(dict.fromkeys(row.method for row in main))
    width = 0.8 / len(methods)
    for row in main:
        height = float(row.value or 0.0)
        place = cases.index(row.case) + (methods.index(row.method) - (len(methods) - 1) / 2) * width
        label = row.method if row.case == cases[0] else None
        axes.bar(place, height, width * 0.9, color=_COLOURS[row.method], label=label)
        ratio = ratios.get((row.case, row.method))
        text = f"{1000 * height:.0f} ms" + (f"\n{ratio:.1f}×" if ratio else "")
        axes.annotate(text, (place, height), ha="center", va="bottom", fontsize=11)
    axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.set_xticks(range(len(cases)), [case.removesuffix("-100-20") for case in cases])
    axes.legend(loc="upper left")


def _draw_curve(axes: "Axes", seconds: Sequence[BenchmarkRow], pattern: re.Pattern[str], label: str) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in seconds:
        found = pattern.fullmatch(row.case)
        if found:
            unit = {"k": 1e3, "M": 1e6}.get(found[2], 1.0) if pattern.groups > 1 else 1.0
            points.setdefault(row.method, []).append((float(found[1]) * unit, float(row.value or 0)))
    for method, values in points.items():
        axes.loglog(*zip(*sorted(values), strict=True), color=_COLOURS[method], marker="o", label=method)
    axes.set(xlabel=label, ylabel="seconds a round")
    if points:
        axes.legend()
    else:
        not_measured(axes)
