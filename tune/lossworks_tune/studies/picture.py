"""The picture of a study: every variant's mean with its interval, yardstick by yardstick."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.reporting.picture_style import STYLE, save_picture
from lossworks_tune.studies.outcome import StudyOutcome
from lossworks_tune.studies.plan import Setting
from lossworks_tune.studies.tables import of_verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DARK, _GREY = "#2b2f36", "#9aa3ad"
_COLOURS = {"confirmed": "#1a7f4b", "contradicted": "#b3261e", "not told apart": "#6b7280"}
_ACROSS = 4  # yardsticks side by side
_WIDTH = 18.0  # inches
_ROW = 0.42  # inches of a variant
_LINE = 0.3  # inches of a line of text
_MOST_VERDICTS = 12

PictureRow = tuple[str, str] | None  # setting and variant; None is a gap between settings


def draw(outcome: StudyOutcome, path: Path) -> list[Path]:
    """Draw a study as PNG, 1800 pixels wide, and as SVG.

    Args:
        outcome: What was found; trainings may be missing.
        path: File without its ending.

    Returns:
        The files; none if there is no value to draw.
    """
    # The object interface with its Agg canvas: no display, no global state, safe in a thread.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    yardsticks = [name for name in outcome.yardsticks if _has_values(outcome, name)]
    if not yardsticks:
        return []
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 1), dpi=100, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # type: ignore[union-attr,call-arg]
        _draw(figure, outcome, yardsticks)
        return save_picture(figure, path.with_suffix(".png"))


def _has_values(outcome: StudyOutcome, yardstick: str) -> bool:
    return any(
        outcome.mean(variant, setting, yardstick)
        for variant in outcome.plan.variants
        for setting in outcome.plan.settings
    )


def _draw(figure: "Figure", outcome: StudyOutcome, yardsticks: Sequence[str]) -> None:
    rows, lines = _rows(outcome), _lines(outcome)
    down = math.ceil(len(yardsticks) / _ACROSS)
    claim = textwrap.wrap(outcome.spec.claim, 160)[:4]
    heights = [
        *(0.5 + _LINE * len(claim), down * (1.2 + _ROW * len(rows)), 0.2 + _LINE * len(lines)),
    ]
    figure.set_size_inches(_WIDTH, sum(heights))
    above, middle, below = figure.subfigures(3, 1, squeeze=False, height_ratios=heights).flat
    above.suptitle(outcome.spec.name, fontsize=19, fontweight="bold", x=0.02, ha="left")
    above.text(0.02, 0.05, "\n".join(claim), fontsize=14, va="bottom")
    grid = middle.subplots(down, math.ceil(len(yardsticks) / down), squeeze=False, sharey=True)
    for axes, yardstick in zip(grid.flat, yardsticks, strict=False):
        _draw_yardstick(axes, outcome, yardstick)
    for axes in list(grid.flat)[len(yardsticks) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
    for at, (colour, text) in enumerate(lines):
        height = 1 - (0.5 + at) / len(lines)
        below.text(0.02, height, textwrap.shorten(text, 190), color=colour, fontsize=13, va="center")


def _rows(outcome: StudyOutcome) -> list[PictureRow]:
    rows: list[PictureRow] = []
    for setting in outcome.plan.settings:
        rows += [None] if setting.title else []
        rows += [(setting.title, variant) for variant in outcome.plan.variants]
    return rows


def _label(row: PictureRow) -> str:
    return "" if row is None else textwrap.shorten(row[1], 44, placeholder=" …")


def _draw_yardstick(axes: "Axes", outcome: StudyOutcome, yardstick: str) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(outcome.plan.variants) <= 10 else "tab20"]
    better = "larger" if outcome.plan.yardsticks[yardstick] == "max" else "smaller"
    axes.set_title(yardstick)
    axes.set_xlabel(f"{better} is better")
    at = 0
    for setting in outcome.plan.settings:
        if setting.title:
            axes.text(0, at + 0.25, setting.title, transform=axes.get_yaxis_transform(), fontweight="bold")
            at += 1
        first = outcome.mean(outcome.plan.variants[0], setting, yardstick)
        if first is not None:
            reach = [at - 0.4, at + len(outcome.plan.variants) - 0.6]
            axes.plot([first.value] * 2, reach, color=_GREY, linestyle=":", linewidth=1.5, zorder=1)
        for place, variant in enumerate(outcome.plan.variants):
            _draw_variant(
                axes, outcome, (variant, setting, yardstick), at + place, colours(place % colours.N)
            )
        at += len(outcome.plan.variants)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)


def _draw_variant(
    axes: "Axes", outcome: StudyOutcome, what: tuple[str, Setting, str], place: int, colour: Any
) -> None:
    """Draw the seeds as small dots, and their mean with its interval."""
    variant, setting, yardstick = what
    mean = outcome.mean(variant, setting, yardstick)
    if mean is None:
        axes.text(0.02, place, "no value", transform=axes.get_yaxis_transform(), color=_GREY, va="center")
        return
    values = list(outcome.values(variant, [setting], yardstick).values())
    style: dict[str, Any] = {"fmt": "s", "markersize": 7, "capsize": 4, "elinewidth": 2}
    # A little below the bar, which would hide them.
    axes.plot(
        values, [place + 0.22] * len(values), "o", color=colour, alpha=0.5, markersize=4, markeredgewidth=0
    )
    axes.errorbar(mean.value, place, xerr=mean.half_width or 0.0, color=colour, **style)


def _lines(outcome: StudyOutcome) -> list[tuple[str, str]]:
    """Return what stands below the picture, line by line with its colour."""
    seeds = len(outcome.plan.seeds)
    interval = "its 95 % interval (Student's t)" if seeds > 1 else "no interval, for want of seeds"
    head = f"Squares: mean over {seeds} seed{'s' * (seeds > 1)} with {interval}. Dots: single seeds. Dotted: "
    said = [(_COLOURS[v.word], f"{v.word}: {of_verdict(v)}") for v in outcome.verdicts]
    more = [(_DARK, f"and {len(said) - _MOST_VERDICTS} more")] if len(said) > _MOST_VERDICTS else []
    notes = [(_DARK, note) for note in outcome.plan.notes]
    return [(_DARK, f"{head}the mean of {outcome.plan.variants[0]}."), *notes, *said[:_MOST_VERDICTS], *more]
