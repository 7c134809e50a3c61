"""Pictures of a sweep: hyperparameters, what decides, curves, the Pareto front, the best on fresh seeds."""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossworks.reporting.picture_style import STYLE, save_picture
from lossworks.reporting.series import Series, series
from lossworks_tune.sweeps.importance import (
    Mark,
    draw_importance,
    head,
    height,
    marks_of,
    padded,
    palette,
    position,
    set_scale,
    span,
    ticks,
)
from lossworks_tune.sweeps.ledger import Trial
from lossworks_tune.sweeps.results import Results
from lossworks_tune.sweeps.space import LOSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DARK, _GREY = "#2b2f36", "#9aa3ad"
_MOST_CURVES, _MOST_CONFIRMED = 2000, 40
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)))  # of the best three
_KINDS: dict[str, dict[str, Any]] = {  # the last ones on top
    "stopped": {"marker": "o", "markersize": 7, "alpha": 0.25, "markeredgewidth": 0},
    "drawn": {"marker": "o", "markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.6},
    "anchor": {"marker": "D", "markersize": 8, "markeredgecolor": _DARK, "markeredgewidth": 1.4},
}
_MEANINGS = {"stopped": "stopped early", "anchor": "at its defaults, or as its parent"}
_FRESH: dict[str, Any] = {"fmt": "s", "markersize": 9, "markeredgecolor": _DARK, "elinewidth": 1.2}
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "handlelength": 4}


def draw_all(results: Results, path: Path) -> list[Path]:
    """Draw a sweep as PNGs, 1800 or 2000 pixels wide, and each as SVG beside it.

    Args:
        results: Of a sweep, which need not have ended.
        path: Existing folder.

    Returns:
        The files; pictures that would be empty are left out.
    """
    # The object interface with its Agg canvas: no display, no global state, safe in a thread.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = []
    with rc_context(STYLE):
        for name, draw in _PICTURES.items():
            figure = Figure(figsize=(18, 10), dpi=100, layout="constrained", facecolor="white")
            figure.get_layout_engine().set(w_pad=0.2, h_pad=0.12)  # type: ignore[union-attr,call-arg]
            if draw(figure, results):
                drawn += save_picture(figure, path / f"{name}.png")
    return drawn


def draw_hyperparameters(figure: "Figure", results: Results) -> bool:
    """Draw the first objective over every dimension; return whether there is anything to draw."""
    marks = list(marks_of(results))
    whole = [mark for mark in marks if mark.kind != "stopped"]
    names = [name for name in results.dimensions if any(name in mark.values for mark in whole)]
    if not names:
        return False
    metric = results.metrics[0]
    limits = span([mark.objective for mark in whole], results.spec.objectives[metric])
    rows = math.ceil(len(names) / 4)
    columns = math.ceil(len(names) / rows)
    figure.set_size_inches(20, 2 + 3.8 * rows)
    beyond = sum(not limits[0] <= mark.objective <= limits[1] for mark in marks)
    head(figure, results, f"{metric} over what was searched", beyond)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for index, (axes, name) in enumerate(zip(panels, names, strict=False)):
        axes.set_title(name if len(name) < 30 else name.replace(".", ".\n"))
        set_scale(axes, results.dimensions[name])
        own = [mark for mark in marks if name in mark.values]
        x = [position(results.dimensions[name], mark.values[name], mark.trial) for mark in own]
        whole_y = np.array([mark.objective for mark in own])
        y = whole_y.clip(*padded(limits))
        bars = [mark.deviation if limits[0] <= mark.objective <= limits[1] else 0 for mark in own]
        axes.errorbar(x, y, bars, fmt="none", ecolor=_GREY, elinewidth=1)
        _scatter(axes, results, own, x, y)
        _mark_beyond(axes, x, y, whole_y)
        axes.set(ylim=padded(padded(limits)), ylabel="" if index % columns else _axis(results, metric))
    for axes in panels[len(names) :]:
        axes.remove()
    _legend(figure, results, [mark.trial for mark in marks], {mark.kind for mark in marks})
    return True


def draw_parallel(figure: "Figure", results: Results) -> bool:
    """Draw finished trials as lines through what all have in common; return whether any differ."""
    names = [LOSS, *results.space.general] if LOSS in results.dimensions else list(results.dimensions)
    marks = [mark for mark in marks_of(results) if mark.kind != "stopped" and {*names} <= {*mark.values}]
    metric, mode = next(iter(results.spec.objectives.items()))
    low, high = span([mark.objective for mark in marks], mode) if marks else (0.0, 0.0)
    if low == high:
        return False
    worst, best = (low, high) if mode == "max" else (high, low)
    beyond = sum(not low <= mark.objective <= high for mark in marks)
    head(figure, results, f"trials by {metric}, the best on top", beyond)
    axes = figure.subplots()
    rails = {name: ticks(results.dimensions[name]) for name in names}
    _draw_rails(axes, rails | {metric: {f"{worst + at / 4 * (best - worst):.4g}": at / 4 for at in range(5)}})
    objectives = np.clip([mark.objective for mark in marks], low, high)
    lines = [
        [*(height(results.dimensions[name], mark.values[name], mark.trial) for name in names), last]
        for mark, last in zip(marks, (objectives - worst) / (best - worst), strict=True)
    ]
    _draw_lines(axes, lines, objectives, _titled(results, marks[0].trial), highest=mode == "max")
    figure.colorbar(axes.collections[0], ax=axes, label=_axis(results, metric), pad=0.01, aspect=40)
    return True


def _draw_lines(
    axes: "Axes", lines: list[list[float]], objectives: np.ndarray, best: str, *, highest: bool
) -> None:
    """Draw lines, the best of which come first, the best on top."""
    from matplotlib.collections import LineCollection

    style: dict[str, Any] = {"cmap": "viridis_r" if highest else "viridis", "alpha": 0.8}
    widths = [3.5 if index < max(3, len(lines) // 20) else 1.2 for index in range(len(lines))]
    paths = [list(enumerate(line)) for line in lines]
    drawn = LineCollection(paths[::-1], array=objectives[::-1], linewidths=widths[::-1], **style)
    axes.add_collection(drawn)
    axes.plot(lines[0], color=_DARK, linewidth=1.5, linestyle=":", marker="o", label=f"best: {best}")
    axes.legend(**_ABOVE)


def _draw_rails(axes: "Axes", rails: dict[str, dict[str, float]]) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
    for place, marked in enumerate(rails.values()):
        axes.axvline(place, color=_DARK, linewidth=1.2)
        size = min(12.0, 360 / len(marked))
        for text, at in marked.items():
            left = place - 0.008 * len(rails)
            axes.text(left, at, text, ha="right", va="center", fontsize=size, bbox=box, zorder=4)
    axes.set_xticks(range(len(rails)), [name.replace(".", ".\n") for name in rails], fontweight="bold")
    axes.set(xlim=(-0.35, len(rails) - 0.95), ylim=(-0.08, 1.08), yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.tick_params(axis="x", length=0)


def draw_curves(figure: "Figure", results: Results) -> bool:
    """Draw the first objective over steps, seed by seed; return whether any was reported."""
    metric = results.metrics[0]
    curves = {trial: found for trial in results.trials if (found := series(trial.rows, metric)) is not None}
    if not curves:
        return False
    head(figure, results, f"{metric} while training")
    axes = figure.subplots()
    colours, steps = palette(results), results.steps
    for trial in list(curves)[:: math.ceil(len(curves) / _MOST_CURVES)]:
        faint: dict[str, Any] = {"alpha": 0.35, "linewidth": 1, "marker": ".", "markersize": 4}
        axes.plot(*_broken(curves[trial], steps), color=colours[trial.configuration.loss], **faint)
    for trial, dashes in zip(filter(curves.__contains__, results.ranked), _DASHES, strict=False):
        style: dict[str, Any] = {"linestyle": dashes, "linewidth": 3.5, "label": _titled(results, trial)}
        axes.plot(*_broken(curves[trial], steps), color=colours[trial.configuration.loss], **style)
    _mark_seeds(axes, results, steps)
    values = np.concatenate([found[1] for found in curves.values()]).tolist()
    limits = span(values, results.spec.objectives[metric])
    axes.set(xlabel="step", ylabel=_axis(results, metric), ylim=padded(limits))
    if results.ranked:
        axes.legend(**_ABOVE)
    _legend(figure, results, curves)
    return True


def _broken(points: Series, steps: int) -> Series:
    """Return a curve with gaps between seeds, of so many steps each."""
    gaps = np.flatnonzero(np.diff((points[0] - 1) // steps)) + 1
    return np.insert(points[0], gaps, np.nan), np.insert(points[1], gaps, np.nan)


def _mark_seeds(axes: "Axes", results: Results, steps: int) -> None:
    seeds = results.spec.seeds
    for place, seed in enumerate(seeds if len(seeds) > 1 else ()):
        if place:
            axes.axvline(place * steps, color=_DARK, linestyle=":", linewidth=1.2)
        if len(seeds) <= 16:
            where: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
            axes.text((place + 0.5) * steps, 0.99, f"seed {seed}", color=_DARK, **where)


def draw_front(figure: "Figure", results: Results) -> bool:
    """Draw both objectives, their Pareto front and fresh seeds; return whether there are two."""
    marks = [mark for mark in marks_of(results) if mark.kind != "stopped"]
    marks = [mark for mark in marks if math.isfinite(mark.trial.value(results.metrics[-1]))]
    if len(results.metrics) != 2 or not marks:
        return False
    (first, second), modes = results.metrics, results.spec.objectives
    points = np.array([[mark.trial.value(metric) for mark in marks] for metric in modes])
    limits = [padded(span(of.tolist(), mode)) for of, mode in zip(points, modes.values(), strict=True)]
    low, high = np.transpose(limits)[:, :, None]
    best = np.array([mark.trial in results.front for mark in marks])
    near = np.where(best, points, points.clip(low, high))
    head(figure, results, f"{second} against {first}", int((near != points).any(axis=0).sum()))
    axes = figure.subplots()
    _scatter(axes, results, marks, *near)
    _mark_beyond(axes, near[0], near[1], points[1])
    front = points[:, best][:, np.argsort(points[0, best])]
    corner = "steps-pre" if modes[first] == "max" else "steps-post"
    axes.plot(*front, drawstyle=corner, color=_DARK, zorder=1, label="Pareto front")
    _draw_fresh(axes, results)
    axes.set(xlabel=_axis(results, first), ylabel=_axis(results, second))
    axes.legend(**_ABOVE | {"ncols": 3})
    _legend(figure, results, [mark.trial for mark in marks], {mark.kind for mark in marks})
    return True


def _draw_fresh(axes: "Axes", results: Results) -> None:
    """Draw what became of confirmed trials: a line from the search's seeds to fresh ones."""
    first, second = results.metrics
    means = [(t, results.fresh(t, first), results.fresh(t, second)) for t in results.trials]
    for trial, x, y in means:
        if x is not None and y is not None:
            axes.plot([trial.value(first), x.value], [trial.value(second), y.value], color=_GREY, linewidth=1)
            style = _FRESH | {"color": palette(results)[trial.configuration.loss]}
            axes.errorbar(x.value, y.value, y.half_width or 0, x.half_width or 0, **style)
    if results.confirmed:
        axes.errorbar([], [], [], color=_GREY, label="on fresh seeds, 95 % interval", **_FRESH)


def draw_confirmed(figure: "Figure", results: Results) -> bool:
    """Draw the first objective on fresh seeds beside the search's; return whether there are any."""
    metric, mode = next(iter(results.spec.objectives.items()))
    found = [(f, t) for t in results.trials if (f := results.fresh(t, metric)) is not None]
    if not found:
        return False
    sign = -1 if mode == "max" else 1
    found = sorted(found, key=lambda pair: sign * pair[0].value)[:_MOST_CONFIRMED]
    figure.set_size_inches(18, 2.4 + 0.9 * len(found))
    head(figure, results, f"{metric} on fresh seeds")
    axes = figure.subplots()
    hollow: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 14, "markerfacecolor": "none"}
    for place, (fresh, trial) in enumerate(found):
        colour = palette(results)[trial.configuration.loss]
        axes.plot([trial.value(metric), fresh.value], [place, place], color=_GREY, linewidth=1)
        axes.plot(trial.value(metric), place, color=colour, **hollow)
        axes.errorbar(fresh.value, place, xerr=fresh.half_width or 0, **_FRESH | {"color": colour})
    axes.plot([], [], color=_GREY, label="on the search's seeds", **hollow)
    axes.errorbar([], [], xerr=[], color=_GREY, label="on fresh seeds, 95 % interval", **_FRESH)
    axes.legend(**_ABOVE | {"ncols": 2})
    names = [f"#{trial.configuration.number} {trial.configuration.title}" for _, trial in found]
    axes.set_yticks(range(len(names)), [textwrap.fill(n, 60, max_lines=3) for n in names], fontsize=12)
    axes.set(xlabel=_axis(results, metric), ylim=(len(names) - 0.5, -0.5))
    _legend(figure, results, [trial for _, trial in found])
    return True


def _scatter(axes: "Axes", results: Results, marks: Sequence[Mark], x: Any, y: Any) -> None:
    for kind, style in _KINDS.items():
        for loss, colour in palette(results).items():
            own = [(mark.kind, mark.trial.configuration.loss) == (kind, loss) for mark in marks]
            axes.plot(np.array(x)[own], np.array(y)[own], color=colour, linestyle="", **style)


def _mark_beyond(axes: "Axes", x: Any, y: Any, meant: Any) -> None:
    """Point with an arrowhead to where points would be that are drawn at the edge."""
    for marker, own in (("$\\downarrow$", meant < y), ("$\\uparrow$", meant > y)):
        if own.any():
            places = np.array(x)[own], np.array(y)[own]
            axes.plot(*places, color=_DARK, linestyle="", marker=marker, markersize=13, zorder=5)


def _legend(figure: "Figure", results: Results, trials: Iterable[Trial], kinds: Iterable[str] = ()) -> None:
    """Name colours and markers once, below."""
    from matplotlib.lines import Line2D

    used = {trial.configuration.loss for trial in trials}
    named = [(loss, colour, "drawn") for loss, colour in palette(results).items() if loss in used]
    named += [(meaning, _GREY, kind) for kind, meaning in _MEANINGS.items() if kind in kinds]
    handles = [Line2D([], [], label=n, color=c, linestyle="", **_KINDS[kind]) for n, c, kind in named]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False)


def _axis(results: Results, metric: str) -> str:
    return f"{metric} ({results.spec.objectives[metric]})"


def _titled(results: Results, trial: Trial) -> str:
    value = trial.value(results.metrics[0])
    title = f"#{trial.configuration.number} {trial.configuration.title}"
    return f"{textwrap.shorten(title, 120, placeholder=' …')}: {value:.4g}"


_PICTURES: dict[str, Callable[["Figure", Results], bool]] = {
    "hyperparameters": draw_hyperparameters,
    "parallel": draw_parallel,
    "importance": draw_importance,
    "curves": draw_curves,
    "front": draw_front,
    "confirmed": draw_confirmed,
}
