"""The chart of ``lossworks bench linear-ce``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.benchmarks.table import BenchmarkRow
from lossworks.reporting.picture_style import BLUE, DARK, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    # method -> distribution -> metric -> figure
    Panel = dict[str, dict[str, dict[str, float]]]

_COLOURS = {"peaked": BLUE, "random": GREY}
_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": DARK,
    "text.color": DARK,
    "xtick.color": DARK,
    "ytick.color": DARK,
}
_TITLE = (
    "Loss and gradients, in matrix products E·Cᵀ of the same dtype, or in times of plain torch,\n"
    "and peak memory beyond the gradients, in % of fp32 logits"
)
PLAIN = "x plain torch"
"""The unit of times that are ratios to plain torch's, and not to a product's."""
_LONGEST = 8.0  # products; longer bars are cut off there, so that the others can be told apart


def draw_linear_ce(rows: Sequence[BenchmarkRow], path: Path) -> Path:
    """Draw time and memory of every method as a PNG: a panel for each shape and dtype.

    Args:
        rows: Figures of ``lossworks bench linear-ce``; those without a value are left out.
        path: File to write.

    Returns:
        ``path``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = _panels(rows)
    plain = {_panel_of(row) for row in rows if row.unit == PLAIN}
    dtypes = len({title.split(", ")[1] for title in panels}) or 1
    lines = -(-len(panels) // dtypes) or 1
    most = max((len(panel) for panel in panels.values()), default=1)
    with rc_context(_STYLE):
        figure = Figure(
            figsize=(8.5 * dtypes, 0.4 + lines * (1.4 + 0.62 * most)), dpi=100, layout="constrained"
        )
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # type: ignore[union-attr,call-arg]
        grid = figure.subplots(lines, dtypes, squeeze=False).flat
        for axes, (title, panel) in zip(grid, panels.items(), strict=False):
            _draw_panel(axes, title, panel, plain=title in plain)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.suptitle(_TITLE, fontsize=14)
        figure.savefig(path, format="png", facecolor="white")
    return path


def _panels(rows: Sequence[BenchmarkRow]) -> "dict[str, Panel]":
    panels: dict[str, Panel] = {}
    for row in rows:
        if row.value is not None:
            distribution = row.case.split(", ")[2]
            panel = panels.setdefault(_panel_of(row), {})
            panel.setdefault(row.method, {}).setdefault(distribution, {})[row.metric] = row.value
    return panels


def _panel_of(row: BenchmarkRow) -> str:
    """Return the title of a figure's panel: its shape and dtype."""
    return ", ".join(row.case.split(", ")[:2])


def _draw_panel(axes: "Axes", title: str, panel: "Panel", *, plain: bool) -> None:
    axes.set_title(f"N x V x D = {title}")
    methods = list(panel)
    kinds = [kind for kind in _COLOURS if any(kind in panel[method] for method in methods)]
    height = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        offset = (index - (len(kinds) - 1) / 2) * height
        having = [(place, panel[method]) for place, method in enumerate(methods) if kind in panel[method]]
        for number, (place, figures) in enumerate(having):
            shift = offset if len(figures) > 1 else 0.0
            label = None if number else kind
            _draw_bar(axes, place + shift, height, figures[kind], _COLOURS[kind], label)
    for products, style in ((1, ":"),) if plain else ((1, ":"), (3, "--")):
        axes.axvline(products, color=ORANGE, linestyle=style, linewidth=1.4, zorder=3)
    axes.set_yticks(range(len(methods)), methods)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_xlim(0, _LONGEST * 1.35)
    axes.set_xlabel(
        "times plain torch (dotted: as long)" if plain else "matrix products (dotted: one; dashed: three)"
    )
    axes.legend(loc="lower right", frameon=False)


def _draw_bar(
    axes: "Axes", y: float, height: float, figures: Mapping[str, float], colour: str, label: str | None
) -> None:
    products = figures["forward+backward"]
    axes.barh(y, min(products, _LONGEST), height * 0.92, color=colour, label=label)
    more = " →" if products > _LONGEST else ""
    memory = figures["extra memory"]
    text = f"{products:.1f}{more}   memory {memory:.{0 if memory >= 10 else 1}f}%"
    # On white, since the dashed line often passes just there.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.text(min(products, _LONGEST) + 0.1, y, text, va="center", fontsize=9.5, zorder=4, bbox=box)
