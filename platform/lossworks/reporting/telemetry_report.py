"""The picture of a run's telemetry: what the loss, its gradient and the logits looked like over the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.reporting.picture_style import BLUE, ORANGE, STYLE, not_measured
from lossworks.reporting.series import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def telemetry_report(rows: Sequence[Mapping[str, Any]], *, title: str, path: Path) -> Path | None:
    """Draw the telemetry as a PNG of 1600 × 1000 pixels; return its path, or None where there is none.

    Args:
        rows: Rows of the run's journal.
        title: Heading.
        path: File to write, in an existing folder.
    """
    without = series(rows, "telemetry/zero_gradient")
    if without is None:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(16, 10), dpi=100, layout="constrained", facecolor="white")
        figure.suptitle(title, fontsize=19, fontweight="bold", x=0.02, ha="left")
        loss, slope, logits, zero = figure.subplots(2, 2).flat
        _draw_bands(loss, rows, "loss", "Loss of single elements")
        _draw_bands(slope, rows, "gradient_norm", "Gradient norm at the logits of a row")
        _draw_bands(logits, rows, "logit_norm", "Norm of a row of logits")
        zero.plot(*without, color=BLUE, marker="o" if without[0].size <= 50 else "")
        zero.set_title("Share of rows without a gradient")
        zero.set(xlabel="step", ylim=(-0.04, 1.04))
        _mark_spikes(loss, rows)
        figure.savefig(path, format="png")
    return path


def _draw_bands(axes: "Axes", rows: Sequence[Mapping[str, Any]], name: str, title: str) -> None:
    """Draw the median within the middle nine tenths, and the largest above."""
    axes.set_title(title)
    low, middle, high, largest = (
        series(rows, f"telemetry/{name}_{which}") for which in ("p05", "p50", "p95", "max")
    )
    if low is None or middle is None or high is None or largest is None:
        not_measured(axes)
        return
    axes.fill_between(low[0], low[1], high[1], color=BLUE, alpha=0.2, linewidth=0, label="5 % to 95 %")
    axes.plot(*middle, color=BLUE, label="median")
    axes.plot(*largest, color=ORANGE, linewidth=1.2, label="largest")
    axes.set(xlabel="step")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.2)


def _mark_spikes(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    spikes = series(rows, "telemetry/spike")
    for step in () if spikes is None else spikes[0]:
        axes.axvline(step, color=ORANGE, linestyle=":", linewidth=1.2)
