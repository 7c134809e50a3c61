"""Where the time of a run went, as one bar of phases, and how well the hardware was used."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lossworks.reporting.phase_colours import PHASE_COLOURS
from lossworks.reporting.picture_style import GREY, not_measured
from lossworks.reporting.series import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WRITABLE = 0.045  # share of the bar that holds a number
_PEAKS = {"train/mfu": "the maker's peak", "train/mfu_of_measured_peak": "the measured peak"}


def time_shares(
    rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float] | None
) -> tuple[dict[str, float], float | None]:
    """Return the share of each phase, and the seconds of all of them if they are known.

    Args:
        rows: Rows of the run's journal; the mean of their shares stands in for a run that has not ended.
        seconds: Of each phase over the whole run, from its outcome; None or empty if not known.
    """
    total = sum((seconds or {}).values())
    if seconds and total:
        return {phase: value / total for phase, value in seconds.items()}, total
    found = {phase: series(rows, f"time/{phase}") for phase in PHASE_COLOURS}
    means = {phase: float(np.mean(points[1])) for phase, points in found.items() if points is not None}
    return means, None


def utilisation(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a run's model FLOPs utilisation, the median over its steps, in words; None if not known."""
    for name, peak in _PEAKS.items():
        points = series(rows, name)
        if points is not None:
            return f"{100 * float(np.median(points[1])):.3g} % of {peak}"
    return None


def draw_phases(axes: "Axes", rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float] | None) -> None:
    """Draw the phases of a run as parts of one bar, with the utilisation in the heading.

    Args:
        axes: Where: wide and low.
        rows: Rows of the run's journal.
        seconds: Of each phase over the whole run; None if not known.
    """
    found, total = time_shares(rows, seconds)
    known = utilisation(rows)
    axes.set_title("Where the time went" + ("" if total is None else f" · {_duration(total)}"))
    axes.set_title(
        f"MFU {known}" if known else "MFU not known", loc="right", fontsize=13, fontweight="normal"
    )
    if not sum(found.values()):
        not_measured(axes)
        return
    left = 0.0
    for phase, share in found.items():
        colour = PHASE_COLOURS.get(phase, GREY)
        axes.barh(
            0,
            share,
            left=left,
            color=colour,
            edgecolor="white",
            linewidth=1.5,
            label=f"{phase} {_percent(share)}",
        )
        if share >= _WRITABLE:
            axes.text(
                left + share / 2,
                0,
                _percent(share),
                ha="center",
                va="center",
                color="white",
                fontweight="bold",
            )
        left += share
    axes.set(xlim=(0, 1), ylim=(-0.42, 0.42))
    axes.set_axis_off()
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        ncols=len(found),
        fontsize=11,
        handlelength=1.0,
        columnspacing=1.3,
        handletextpad=0.5,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0.0005 <= share < 0.0095 else f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"
