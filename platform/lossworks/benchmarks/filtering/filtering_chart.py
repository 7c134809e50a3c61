"""The chart of ``lossworks bench filtering``."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.benchmarks.table import BenchmarkRow
from lossworks.reporting.picture_style import BLUE, DARK, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "exact in bf16": GREY,
    "published": ORANGE,
    "published, repaired": "#f0a030",
    "columns": "#7a3e9d",
    "columns, repaired": BLUE,
}
_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": DARK,
    "text.color": DARK,
    "xtick.color": DARK,
    "ytick.color": DARK,
}
_STEP = re.compile(r"hidden states after (\d+) steps")
_CHARTED = "2^-12"  # of the three thresholds, the one that the published filter has for bf16


def draw_filtering(rows: Sequence[BenchmarkRow], path: Path) -> Path:
    """Draw held-out losses minus those of exact training, and the gradients' errors over its steps.

    Args:
        rows: Figures of ``lossworks bench filtering``; a panel without figures stays empty.
        path: PNG to write.

    Returns:
        ``path``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(13, 9), dpi=100, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # type: ignore[union-attr,call-arg]
        (left, right), (below_left, below_right) = figure.subplots(2, 2)
        _draw_losses(left, rows, "loss", "Held-out loss minus exact")
        _draw_losses(right, rows, "rare loss", "Rare tokens' held-out loss minus exact")
        _draw_errors(below_left, rows, "error dE", "Relative error of ∂E, ε = 2⁻¹²")
        _draw_errors(below_right, rows, "error dC", "Relative error of ∂C, ε = 2⁻¹²")
        handles, labels = below_right.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(path, format="png", facecolor="white")
    return path


def _draw_losses(axes: "Axes", rows: Sequence[BenchmarkRow], metric: str, title: str) -> None:
    first = next((row.case for row in rows if row.case.startswith("trained")), "")
    figures = {(row.method, row.metric): row.value for row in rows if row.case == first}
    methods = [method for method, name in figures if name == f"{metric} minus exact" and _is_charted(method)]
    axes.set_title(title)
    axes.axvline(0, color=DARK, linewidth=1)
    for place, method in enumerate(methods):
        value = figures[method, f"{metric} minus exact"] or 0.0
        error = figures[method, f"{metric} minus exact, error"] or 0.0
        axes.errorbar(
            value, place, xerr=error, fmt="o", color=_colour(method), capsize=5, markersize=8, linewidth=2
        )
        text = f"{value:+.4f} ± {error:.4f}"
        axes.annotate(text, (value, place), (0, 10), textcoords="offset points", ha="center", fontsize=9.5)
    axes.set_yticks(range(len(methods)), [_short(method) for method in methods])
    axes.set_ylim(len(methods) - 0.5, -0.7)
    axes.margins(x=0.2)
    axes.set_xlabel("nats a token, mean ± standard error over seeds")


def _draw_errors(axes: "Axes", rows: Sequence[BenchmarkRow], metric: str, title: str) -> None:
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        step = _STEP.match(row.case)
        if step and row.metric == metric and row.value and _is_charted(row.method):
            lines.setdefault(row.method, {})[int(step[1])] = row.value
    steps = sorted({step for line in lines.values() for step in line})
    axes.set_title(title)
    for method, line in lines.items():
        places = [steps.index(step) for step in line]
        axes.plot(places, list(line.values()), "o-", color=_colour(method), linewidth=2, label=_short(method))
    if lines:
        axes.set_yscale("log")
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set_xlabel("training steps")
    axes.grid(axis="y", color="#e3e6ea")


def _is_charted(method: str) -> bool:
    return "2^-" not in method or method.endswith(_CHARTED)


def _short(method: str) -> str:
    return method.partition(", 2^-")[0]


def _colour(method: str) -> str:
    return _COLOURS.get(_short(method), DARK)
