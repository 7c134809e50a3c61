"""The report of a training run in one picture.

A language model's has loss, learning rate, speed and memory of the head; a classifier's has loss, accuracy,
reliability and speed. Both say where the time went and how well the hardware was used.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossworks.reporting.phase_strip import draw_phases
from lossworks.reporting.picture_style import (
    BLUE,
    DARK,
    GREY,
    ORANGE,
    STYLE,
    not_measured,
    save_picture,
    step_axis,
)
from lossworks.reporting.series import Series, series, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lossworks.tasks.interface import Task


def train_report(
    rows: Sequence[Mapping[str, Any]],
    *,
    head_memory: Mapping[str, float] | None,
    title: str,
    path: Path,
    task: "type[Task]",
    guess: float | None = None,
    loss: str = "nats per token",
    pictured: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Path:
    """Draw the report of a run as a PNG of 1600 × 1000 pixels, and as SVG beside it.

    Series that were not measured are named as such; values that are not finite are left out.

    Args:
        rows: Rows of the run's journal.
        head_memory: Peak memory of the head in bytes by way of computing it, ours first; None if unknown.
        title: Heading.
        path: File to write; its folder is created.
        task: What was trained; it draws its own panels.
        guess: The loss of a uniform guess, to be marked; None for none.
        loss: What the trained loss is counted in.
        pictured: What the last evaluation gave to be drawn; None or empty if unknown.
        seconds: Of each phase over the whole run; None or empty if unknown.

    Returns:
        ``path``.
    """
    # The object interface with its Agg canvas: no display, no global state, safe in a thread.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(16, 10), dpi=100, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.2, h_pad=0.2, wspace=0.03, hspace=0.04)  # type: ignore[union-attr,call-arg]
        figure.suptitle(title, fontsize=19, fontweight="bold", x=0.02, ha="left")
        grid = figure.add_gridspec(3, 2, height_ratios=(1, 1, 0.2))
        curve, second, speed, last = (figure.add_subplot(grid[at // 2, at % 2]) for at in range(4))
        draw_phases(figure.add_subplot(grid[2, :]), rows, seconds)
        _draw_loss(curve, rows, guess, loss)
        _draw_speed(speed, rows, task.unit)
        if task.panels is None:
            _draw_rate(second, series(rows, "train/lr"))
            _draw_memory(last, head_memory)
        else:
            draw_yardsticks(second, rows, *task.panels)
            _draw_last(last, rows, task, pictured or {})
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(figure, path)
    return path


def _draw_last(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], task: "type[Task]", pictured: Mapping[str, Any]
) -> None:
    """Draw what the task has to show; the learning rate where it has nothing."""
    if not task.draw(axes, pictured):
        _draw_rate(axes, series(rows, "train/lr"))


def _draw_loss(axes: "Axes", rows: Sequence[Mapping[str, Any]], guess: float | None, unit: str) -> None:
    train, held_out = series(rows, "train/loss"), series(rows, "eval/loss")
    axes.set_title("Loss")
    if train is None and held_out is None:
        not_measured(axes)
        return
    if train is not None:
        _draw_smoothed(axes, train, "training")
    if held_out is not None:
        marker = "o" if held_out[0].size <= 50 else ""
        axes.plot(*held_out, color=ORANGE, marker=marker, markersize=6, label="held-out")
    if guess is not None:
        _mark_level(axes, guess, f"uniform guess, ln {math.exp(guess):,.0f} = {guess:.2f}")
    step_axis(axes)
    axes.set(ylabel=unit)
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.88))


def _draw_rate(axes: "Axes", points: Series | None) -> None:
    axes.set_title("Learning rate")
    if points is None:
        not_measured(axes)
        return
    axes.plot(*points, color=BLUE)
    step_axis(axes)
    axes.set(ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_speed(axes: "Axes", rows: Sequence[Mapping[str, Any]], unit: str) -> None:
    from matplotlib.ticker import StrMethodFormatter

    axes.set_title("Throughput")
    points = series(rows, f"train/{unit}_per_second")
    if points is None:
        not_measured(axes)
        return
    _draw_smoothed(axes, points, f"{unit}/s")
    median = float(np.median(points[1]))
    _mark_level(axes, median, f"median {median:,.0f}")
    step_axis(axes)
    axes.set(ylabel=f"{unit} per second")
    axes.set_ylim(0, 1.3 * float(np.max(points[1])) or 1.0)  # room for the legend above the curve
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(loc="upper right", ncols=3)


def draw_yardsticks(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], title: str, shown: Mapping[str, str]
) -> None:
    """Draw one or two yardsticks over the steps.

    Args:
        axes: Where.
        rows: Of the run's journal.
        title: Heading.
        shown: Label by tracked name.
    """
    axes.set_title(title)
    highest = 1.0
    lines = [(points, label) for name, label in shown.items() if (points := series(rows, name)) is not None]
    lowest = min((points[1][-1] for points, _ in lines), default=0.0)
    for (points, label), colour in zip(lines, (BLUE, ORANGE), strict=False):
        axes.plot(*points, color=colour, marker="o" if points[0].size <= 50 else "", label=label)
        under = len(lines) > 1 and points[1][-1] == lowest  # two figures above each other would meet
        axes.annotate(
            f"{points[1][-1]:.3f}" if abs(points[1][-1]) < 10 else f"{points[1][-1]:,.4g}",
            (points[0][-1], points[1][-1]),
            xytext=(0, -8 if under else 8),
            textcoords="offset points",
            ha="right",
            va="top" if under else "bottom",
            color=colour,
            fontweight="bold",
        )
        highest = max(highest, float(np.max(points[1])))
    step_axis(axes)
    axes.set(ylim=(0, 1.15 * highest))
    if axes.lines:
        axes.legend(loc="center right")
    else:
        not_measured(axes)


def _draw_memory(axes: "Axes", head_memory: Mapping[str, float] | None) -> None:
    from matplotlib.ticker import StrMethodFormatter

    axes.set_title("Peak memory of the head")
    sizes = {name: size for name, size in (head_memory or {}).items() if math.isfinite(size)}
    if not sizes:
        not_measured(axes)
        return
    mib = [size / 2**20 for size in sizes.values()]
    colours = [BLUE if index == 0 else GREY for index in range(len(mib))]
    bars = axes.bar(list(sizes), mib, width=0.5, color=colours)
    axes.bar_label(bars, labels=[_mib(size) for size in mib], padding=4, fontsize=14, fontweight="bold")
    axes.set(ylabel="MiB")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_ylim(0, 1.15 * max(mib) or 1.0)
    axes.set_xlim(-0.7, len(mib) - 0.3)
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0)


def _draw_smoothed(axes: "Axes", points: Series, label: str) -> None:
    steps, values = points
    if values.size < 20:
        axes.plot(steps, values, color=BLUE, marker="o", markersize=4, label=label)
        return
    axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=1.0)
    axes.plot(steps, smooth(values, max(values.size // 40, 3)), color=BLUE, label=f"{label}, smoothed")


def _mark_level(axes: "Axes", level: float, text: str) -> None:
    axes.axhline(level, color=DARK, linestyle="--", linewidth=1.2, zorder=1.5)
    axes.annotate(
        text,
        (0.99, level),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=12,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.0},
    )
    axes.margins(y=0.12)


def _mib(size: float) -> str:
    return f"{size:,.0f} MiB" if size >= 100 else f"{size:.3g} MiB"
