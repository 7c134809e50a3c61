"""How all pictures look: fonts, colours, frames, and what stands in an empty one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, DARK = "#2563a8", "#d9541e", "#9aa3ad", "#2b2f36"
STYLE: Any = {
    "svg.hashsalt": "lossworks",  # the same picture has the same bytes
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": DARK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "text.color": DARK,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "legend.facecolor": "white",
    "legend.edgecolor": "white",
    "legend.framealpha": 0.85,
    "lines.linewidth": 2.0,
}


def save_picture(figure: "Figure", path: Path) -> list[Path]:
    """Write a figure as PNG, and beside it as SVG, which stays sharp at any size; return both files."""
    files = [path, path.with_suffix(".svg")]
    figure.savefig(files[0], format="png")
    figure.savefig(files[1], format="svg", metadata={"Date": None})
    return files


def step_axis(axes: "Axes") -> None:
    """Count steps along the lower edge, in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def not_measured(axes: "Axes") -> None:
    """Say so in an empty picture."""
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#e4e7eb")
