"""The picture of a comparison: accuracy over rounds and bytes, spread over clients, drift, loss terms."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossworks.reporting.picture_style import BLUE, ORANGE, STYLE, not_measured, save_picture
from lossworks_federated.reporting.comparison import ComparedStrategy, Comparison
from lossworks_federated.reporting.yardstick import Yardstick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TERMS = {"local": "terms/local", "shift": "terms/shift", "aggregation": "terms/aggregation"}
_TERM_COLOURS = (BLUE, ORANGE, "#6b8f3a")


def draw_comparison(comparison: Comparison, path: Path, *, title: str) -> list[Path]:
    """Draw a comparison as PNG, 2000 × 1100 pixels, and SVG: means over seeds, with all seeds in between.

    Where virtual time has passed, two more panels show accuracy over it and how long rounds were.

    Args:
        comparison: At least one entry.
        path: File to write, in an existing folder.
        title: Heading.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        return save_picture(comparison_figure(comparison, title), path)


def comparison_figure(comparison: Comparison, title: str) -> "Figure":
    """Return what :func:`draw_comparison` draws."""
    from matplotlib.figure import Figure

    across = 4 if comparison.timed else 3
    size = (20 / 3 * across, 11)
    figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor="white")
    seeds = len({entry.seed for entry in comparison.entries})
    many = f", means and ranges over {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(f"{title}{many}", fontsize=19, fontweight="bold", x=0.02, ha="left")
    panels = figure.subplots(2, across)
    (rounds, sent, spread), (drift, disagreement, terms) = panels[:, :3]
    colours = _colours(comparison)
    words = comparison.yardstick.words
    _draw_curves(rounds, comparison, comparison.yardstick.curve, colours)
    rounds.set(title=f"Held-out {words} over rounds", ylabel=words)
    _mark_target(rounds, comparison.target)
    _draw_bytes(sent, comparison, colours)
    _draw_spread(spread, comparison, colours)
    _draw_curves(drift, comparison, "drift/norm", colours)
    drift.set(title="Client drift: mean norm of updates", ylabel="norm")
    drift.set_ylim(bottom=0)
    _draw_curves(disagreement, comparison, "drift/disagreement", colours)
    disagreement.set(title="Disagreement of updates, 0 where all agree", ylabel="disagreement")
    # Means are weighted by examples, so that small clients may be further from it than updates are long.
    disagreement.set_ylim(0, max(1.05, disagreement.get_ylim()[1]))
    if comparison.timed:
        _draw_virtual(panels[0, 3], panels[1, 3], comparison, colours)
    _draw_terms(terms, comparison)
    handles, labels = rounds.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    return figure


def _colours(comparison: Comparison) -> dict[str, tuple[float, ...]]:
    from matplotlib import colormaps

    names = comparison.strategies
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: palette(index % palette.N) for index, name in enumerate(names)}


def _draw_curves(
    axes: "Axes", comparison: Comparison, metric: str, colours: dict[str, tuple[float, ...]]
) -> None:
    drawn = False
    for name in comparison.strategies:
        curves = [entry.curves[metric] for entry in comparison.of(name) if metric in entry.curves]
        if not curves:
            continue
        drawn = True
        steps, values = _aligned(curves)
        axes.plot(steps, values.mean(0), color=colours[name], label=name)
        if len(values) > 1:
            axes.fill_between(
                steps, values.min(0), values.max(0), color=colours[name], alpha=0.15, linewidth=0
            )
    axes.set(xlabel="round")
    _count_whole(axes)
    if not drawn:
        not_measured(axes)


def _aligned(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that all curves have, and their values there, one row a curve."""
    steps = curves[0][0]
    for other, _ in curves[1:]:
        steps = np.intersect1d(steps, other)
    return steps, np.stack([values[np.isin(own, steps)] for own, values in curves])


def _draw_bytes(axes: "Axes", comparison: Comparison, colours: dict[str, tuple[float, ...]]) -> None:
    words = comparison.yardstick.words
    axes.set_title(f"Held-out {words} over what was sent")
    for name in comparison.strategies:
        for entry in comparison.of(name):
            if {"bytes/up", comparison.yardstick.curve} <= entry.curves.keys():
                steps, up = entry.curves["bytes/up"]
                total = (steps, (up + entry.curves["bytes/down"][1]) / 2**20)
                axes.plot(
                    *_over(entry, comparison.yardstick.curve, total),
                    color=colours[name],
                    alpha=0.7,
                    linewidth=1.6,
                )
    _mark_target(axes, comparison.target)
    axes.set(xlabel="MiB up and down, all clients", ylabel=words)


def _over(
    entry: ComparedStrategy, curve: str, cost: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return what was spent up to each measured round, and the figure there."""
    steps, values = entry.curves[curve]
    spent = dict(zip(*cost, strict=True))
    known = [index for index, step in enumerate(steps) if step in spent]
    return np.array([spent[steps[index]] for index in known]), values[known]


def _draw_virtual(
    accuracy: "Axes", length: "Axes", comparison: Comparison, colours: dict[str, tuple[float, ...]]
) -> None:
    for name in comparison.strategies:
        for entry in comparison.of(name):
            if not {"virtual/seconds", comparison.yardstick.curve} <= entry.curves.keys():
                continue
            steps, seconds = entry.curves["virtual/seconds"]
            style: Any = {"color": colours[name], "alpha": 0.7, "linewidth": 1.6}
            accuracy.plot(*_over(entry, comparison.yardstick.curve, (steps, seconds)), **style)
            length.plot(steps[1:], np.diff(seconds), **style)
    _mark_target(accuracy, comparison.target)
    words = comparison.yardstick.words
    accuracy.set(title=f"Held-out {words} over virtual time", xlabel="virtual seconds", ylabel=words)
    length.set(title="Length of rounds", xlabel="round", ylabel="virtual seconds")
    length.set_ylim(bottom=0)
    _count_whole(length)


def _count_whole(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _draw_spread(axes: "Axes", comparison: Comparison, colours: dict[str, tuple[float, ...]]) -> None:
    yardstick = comparison.yardstick
    axes.set_title("Clients on their own tests, last round")
    names = comparison.strategies
    tested = [
        [one for e in comparison.of(name) if e.outcome for one in e.outcome.clients.values()]
        for name in names
    ]
    values = [[one[yardstick.name] for one in own if yardstick.name in one] for own in tested]
    if not any(values):
        not_measured(axes)
        return
    boxes = axes.boxplot(
        values,
        orientation="horizontal",
        widths=0.6,
        patch_artist=True,
        whis=(10, 90),
        flierprops={"markersize": 3, "alpha": 0.4},
        medianprops={"color": "black"},
    )
    for box, name in zip(boxes["boxes"], names, strict=True):
        box.set(facecolor=colours[name], alpha=0.5)
    axes.set_yticks(range(1, len(names) + 1), names)
    axes.invert_yaxis()
    axes.set(xlabel=f"{yardstick.words}; box: quartiles, whiskers: worst and best tenth")
    if yardstick == Yardstick():  # which lies between 0 and 1
        axes.set_xlim(-0.02, 1.02)


def _draw_terms(axes: "Axes", comparison: Comparison) -> None:
    axes.set_title("Loss terms, last 10 measured rounds")
    names = [n for n in comparison.strategies if any("terms/local" in e.curves for e in comparison.of(n))]
    if not names:
        not_measured(axes)
        return
    height = 0.26
    for index, (label, metric) in enumerate(_TERMS.items()):
        means = [
            np.mean([e.curves[metric][1][-10:].mean() for e in comparison.of(name) if metric in e.curves])
            for name in names
        ]
        places = np.arange(len(names)) + (index - 1) * height
        axes.barh(places, means, height, color=_TERM_COLOURS[index], label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="loss")
    # Below the panel, where no bar is; the space is there, since the axis beside it has a label as well.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False, fontsize=11)


def _mark_target(axes: "Axes", target: float | None) -> None:
    if target is not None:
        axes.axhline(target, color="black", linestyle=":", linewidth=1.2)
