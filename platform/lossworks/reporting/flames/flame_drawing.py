"""Flame graphs drawn: an SVG with a tooltip a box, and a PNG for the report."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from lossworks.reporting.flames.flame import Box
from lossworks.reporting.phase_colours import PHASE_COLOURS

_WIDTH, _ROW, _TOP, _LETTER = 1600, 18, 74, 6.4
_DEEPEST = 48  # rows of the PNG
_FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"


def write_svg(boxes: Sequence[Box], *, title: str, path: Path) -> Path:
    """Write a flame graph that any browser opens: no script, nothing from elsewhere; return its path.

    Args:
        boxes: Callers first.
        title: Heading.
        path: File to write, in an existing folder.
    """
    height = _TOP + _ROW * (1 + max((box.depth for box in boxes), default=0)) + 10
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' {_FONT} font-size='11'>",
        f"<rect width='{_WIDTH}' height='{height}' fill='white'/>",
        f"<text x='10' y='26' font-size='18' font-weight='bold' fill='#2b2f36'>{escape(title)}</text>",
        *_legend(boxes),
        *(_box(box, height) for box in boxes),
        "</svg>",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def describe(box: Box) -> str:
    """Return what a box is, for its tooltip."""
    times = f"{box.count:,} call{'s' * (box.count != 1)}"
    return f"{box.name} · {box.milliseconds:,.2f} ms · {100 * box.width:.1f} % · {times} · {box.phase}"


def _legend(boxes: Sequence[Box]) -> list[str]:
    present = [phase for phase in PHASE_COLOURS if any(box.phase == phase for box in boxes)]
    return [
        f"<rect x='{10 + 130 * index}' y='42' width='12' height='12' fill='{PHASE_COLOURS[phase]}'/>"
        f"<text x='{28 + 130 * index}' y='52' font-size='12' fill='#2b2f36'>{phase}</text>"
        for index, phase in enumerate(present)
    ]


def _box(box: Box, height: int) -> str:
    left, width = _WIDTH * box.left, _WIDTH * box.width
    y = height - 10 - _ROW * (box.depth + 1)
    text = fitting(box.name, width)
    label = f"<text x='{left + 3:.1f}' y='{y + 12.5:.1f}' fill='white'>{escape(text)}</text>" if text else ""
    return (
        f"<g><title>{escape(describe(box))}</title>"
        f"<rect x='{left:.2f}' y='{y}' width='{max(width - 0.4, 0.3):.2f}' height='{_ROW - 1}' rx='1.5' "
        f"fill='{PHASE_COLOURS[box.phase]}' fill-opacity='{0.95 if box.depth % 2 else 0.82}'/>{label}</g>"
    )


def fitting(name: str, width: float) -> str:
    """Return as much of a name as fits into so many pixels; nothing if that is less than three letters."""
    letters = int((width - 6) / _LETTER)
    if len(name) <= letters:
        return name
    return f"{name[: letters - 1]}…" if letters >= 4 else ""


def write_png(boxes: Sequence[Box], *, title: str, path: Path) -> Path:
    """Draw a flame graph as a PNG 1600 pixels wide, its lowest 48 rows; return its path.

    Args:
        boxes: Callers first.
        title: Heading.
        path: File to write, in an existing folder.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    from lossworks.reporting.picture_style import STYLE

    shown = [box for box in boxes if box.depth < _DEEPEST]
    rows = 1 + max((box.depth for box in shown), default=0)
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(16, 1.2 + 0.21 * rows), dpi=100, facecolor="white")
        axes = figure.add_axes((0.01, 0.01, 0.98, 1 - 0.95 / (1.2 + 0.21 * rows)))
        axes.set(xlim=(0, 1), ylim=(0, rows))
        axes.set_axis_off()
        figure.text(0.01, 1 - 0.3 / (1.2 + 0.21 * rows), title, fontsize=17, fontweight="bold", va="center")
        for box in shown:
            corner, size = (box.left, box.depth), (max(box.width - 0.0004, 0.0002), 0.93)
            colour = PHASE_COLOURS[box.phase]
            axes.add_patch(Rectangle(corner, *size, color=colour, alpha=1.0 if box.depth % 2 else 0.85, lw=0))
            text = fitting(box.name, _WIDTH * 0.98 * box.width)
            if text:
                place = (box.left + 0.002, box.depth + 0.44)
                axes.text(*place, text, va="center", fontsize=8, color="white", parse_math=False)
        present = [phase for phase in PHASE_COLOURS if any(box.phase == phase for box in shown)]
        figure.legend(
            handles=[Patch(color=PHASE_COLOURS[phase], label=phase) for phase in present],
            loc="upper left",
            bbox_to_anchor=(0.005, 1 - 0.45 / (1.2 + 0.21 * rows)),
            ncols=len(PHASE_COLOURS),
            frameon=False,
            fontsize=11,
        )
        figure.savefig(path, format="png")
    return path
