"""The picture of a loss: its value and gradient against the margin, for several hyperparameter values."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lossworks.catalogue.declaration import Hyperparameter
from lossworks.catalogue.registry import create, declaration
from lossworks.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CLASSES, _REACH, _POINTS, _CURVES = 10, 8.0, 401, 5
_COLOURS = ("#9ecae1", "#4292c6", "#08306b", "#f16913", "#a63603")


def draw_loss(slug: str, path: Path) -> Path:
    """Draw the loss of a row of ten classes whose label's logit leads the best of the others by a margin.

    A line of panels for each searched number, the loss on the left and its derivative by the margin on the
    right; the default is drawn bold.

    Args:
        slug: A row or sequence loss of the catalogue.
        path: PNG to write.

    Raises:
        UserError: It isn't a function of one row of logits, or the file can't be written.
    """
    from matplotlib.figure import Figure

    entry = declaration(slug)
    if not entry.without_logits or entry.kind not in ("row", "sequence"):
        raise UserError(f"{slug}: a {entry.kind} loss is no function of one margin, so it can't be drawn")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}")
    searched = [p for p in entry.hyperparameters if p.search and p.type in ("number", "integer")]
    lines: list[Hyperparameter | None] = [*searched] or [None]
    figure = Figure(figsize=(10, 1.0 + 3.4 * len(lines)), dpi=110, layout="constrained")
    grid = figure.subplots(len(lines), 2, squeeze=False)
    for panels, parameter in zip(grid, lines, strict=True):
        _draw_line(slug, panels, parameter)
    figure.suptitle(f"{slug}:  {entry.formula}", fontsize=12)
    figure.savefig(path, format="png", facecolor="white")
    return path


def _draw_line(slug: str, panels: "tuple[Axes, Axes]", parameter: Hyperparameter | None) -> None:
    margin = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    values = [None] if parameter is None else curve_values(parameter)
    for value, colour in zip(values, _COLOURS, strict=False):
        settings = {} if parameter is None else {parameter.name: value}
        loss, slope = along_margin(slug, settings, margin)
        bold = parameter is None or value == parameter.default
        label = (
            None if parameter is None else f"{parameter.name} = {value:g}" + (" (default)" if bold else "")
        )
        for axes, y in zip(panels, (loss, slope), strict=True):
            axes.plot(margin, y, color=colour, linewidth=2.6 if bold else 1.5, label=label)
    for axes, title in zip(panels, ("loss", "derivative by the margin"), strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("margin of the label's logit over the best other class")
        axes.axvline(0, color="#c0c0c0", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    # A steep curve would flatten all others.
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(max(low, -4.0), min(high, 12.0))
    low, high = panels[1].get_ylim()
    panels[1].set_ylim(max(low, -2.0), min(high, 1.0))
    if parameter is not None:
        panels[0].legend(frameon=False, fontsize=9)


def curve_values(parameter: Hyperparameter) -> list[float]:
    """Return values over the searched range with the default among them, ascending."""
    low, high = parameter.search or (parameter.default, parameter.default)
    count = _CURVES - 1
    if parameter.log:
        step = math.log(high / low) / (count - 1)
        values = [low * math.exp(step * index) for index in range(count)]
    else:
        values = [low + (high - low) * index / (count - 1) for index in range(count)]
    if parameter.type == "integer":
        values = [float(round(value)) for value in values]
    return sorted({*(float(f"{value:.2g}") for value in values), float(parameter.default)})


def along_margin(
    slug: str, settings: dict[str, Any], margin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and its derivative at each margin, both shaped like ``margin``."""
    loss = create(slug, reduction="none", **settings)
    lead = margin.clone().requires_grad_()
    # Spread out, since a loss that normalises the logits sees nothing in equal ones.
    others = torch.linspace(-4.0, 0.0, _CLASSES - 1, dtype=margin.dtype).expand(len(margin), -1)
    logits = torch.cat((lead[:, None], others), dim=1)
    targets = torch.zeros(len(margin), dtype=torch.int64)
    if declaration(slug).kind == "sequence":  # of one token each
        logits, targets = logits[:, None], targets[:, None]
    values = loss(logits, targets)
    (slope,) = torch.autograd.grad(values.sum(), lead)
    return values.detach().reshape(-1), slope
