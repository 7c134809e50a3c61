"""The learning rate, and weights of losses that change, over all steps of a run: drawn from its spec."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lossworks.errors import UserError
from lossworks.reporting.picture_style import BLUE, DARK, GREY, ORANGE, STYLE, save_picture, step_axis
from lossworks.specs import RunSpec
from lossworks.training.schedule import lr_factor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 2000  # more than a picture has pixels along its lower edge

Curves = Mapping[str, np.ndarray]
"""Float64 values at the drawn steps, by what they are called."""


def draw_schedule(spec: RunSpec, path: Path) -> list[Path]:
    """Draw the learning rate over all steps, and below it the weights of losses that change over steps.

    Args:
        spec: The run; nothing of it is started.
        path: File to write, .png or .svg, in an existing folder; the other one is written beside it.

    Returns:
        Both files.

    Raises:
        UserError: The folder isn't there, or the name ends otherwise.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot-schedule {path}: must end with .png or .svg; both are written")
    if not path.parent.is_dir():
        raise UserError(f"--plot-schedule {path}: there is no folder {path.parent}")
    steps = np.unique(np.linspace(1, spec.steps, min(spec.steps, _POINTS)).round().astype(int))
    panels = {"Learning rate": learning_rates(spec, steps)}
    if weights := loss_weights(spec, steps):
        panels["Weight of a loss"] = weights
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 1 + 4 * len(panels)), dpi=100, layout="constrained", facecolor="white")
        figure.suptitle(_title(spec), fontsize=17, fontweight="bold", x=0.02, ha="left")
        places = figure.subplots(len(panels), squeeze=False).flat
        for axes, (title, curves) in zip(places, panels.items(), strict=True):
            _draw(axes, title, steps, curves)
        return save_picture(figure, path.with_suffix(".png"))


def learning_rates(spec: RunSpec, steps: np.ndarray) -> Curves:
    """Return the learning rates at steps, counted from 1; two where Muon and the AdamW beside it differ."""
    factors = np.array([lr_factor(spec.schedule, step=int(step), steps=spec.steps) for step in steps])
    beside = spec.optimizer.hyperparameters.get("adamw_lr")
    if beside is None:
        return {spec.optimizer.kind: spec.optimizer.lr * factors}
    return {"muon": spec.optimizer.lr * factors, "adamw": beside * factors}


def loss_weights(spec: RunSpec, steps: np.ndarray) -> Curves:
    """Return the weights at steps of those losses whose weight follows a line."""
    terms = zip(spec.loss.titles, spec.loss.terms, strict=True)
    return {
        title: np.array([term.weight.at(int(step)) for step in steps])
        for title, term in terms
        if term.weight.final is not None
    }


def _title(spec: RunSpec) -> str:
    return f"{spec.name}: {spec.optimizer.kind}, {spec.schedule.kind}, {spec.steps:,} steps"


def _draw(axes: "Axes", title: str, steps: np.ndarray, curves: Curves) -> None:
    axes.set_title(title)
    for (name, values), colour in zip(curves.items(), cycle((BLUE, ORANGE, GREY, DARK)), strict=False):
        axes.plot(steps, values, color=colour, label=name, marker="o" if steps.size <= 50 else "")
    step_axis(axes)
    axes.set_ylabel(title.lower())
    if all(values.min() >= 0 for values in curves.values()):
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderaxespad=0.2)
