"""The picture of clients over rounds: whom each strategy serves well, and from when on."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lossworks.reporting.picture_style import STYLE, save_picture
from lossworks_federated.reporting.client_figures import ClientFigures
from lossworks_federated.reporting.yardstick import Yardstick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

_MOST_ROWS, _MOST_COLUMNS, _NAMED = 100, 200, 40
_ACROSS = 3


def draw_client_heat_map(found: Mapping[str, ClientFigures], path: Path, *, title: str) -> list[Path]:
    """Draw figures, clients × rounds, as PNG and SVG: a panel a strategy, all with the same clients.

    Clients are sorted by their mean figure over all tests and strategies, the best at the top. More than
    100 clients, or 200 measured rounds, are averaged in bins.

    Args:
        found: At least one test each, by title of the strategy.
        path: File to write, in an existing folder.
        title: Heading.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    across = min(len(found), _ACROSS)
    down = -(-len(found) // across)
    yardstick = next(iter(found.values())).yardstick
    order = _by_figure(list(found.values()))
    values = np.concatenate([one.values for one in found.values()])
    # Accuracies lie between 0 and 1, and others where they lie.
    limits = (0.0, 1.0) if yardstick == Yardstick() else (float(values.min()), float(values.max()))
    with rc_context({**STYLE, "axes.grid": False}):
        size = (7.0 * max(across, 1.6), 1.2 + 6.0 * down)
        figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor="white")
        figure.suptitle(title, fontsize=19, fontweight="bold", x=0.02, ha="left")
        panels = figure.subplots(down, across, squeeze=False, sharex=True)
        for axes in panels.flat[len(found) :]:
            axes.set_axis_off()
        for place, (name, figures) in enumerate(found.items()):
            axes = panels.flat[place]
            image = _draw_panel(axes, figures, order, limits)
            clients, means = figures.last()
            worst = (yardstick.sign * means).argmin()
            axes.set_title(
                f"{name}\nmean {means.mean():.2f}, worst {means[worst]:.2f} (client {clients[worst]})"
            )
            if place % across == 0:
                axes.set_ylabel(_row_label(len(order)))
            if place + across >= len(found):
                axes.set_xlabel("round")
                axes.tick_params(labelbottom=True)
        bar = figure.colorbar(image, ax=panels, shrink=0.7, aspect=30)
        bar.set_label(f"{yardstick.words} on the client's own tests")
        return save_picture(figure, path)


def _by_figure(found: list[ClientFigures]) -> np.ndarray:
    """Return all clients, the worst first."""
    clients, places = np.unique(np.concatenate([one.clients for one in found]), return_inverse=True)
    values = np.concatenate([one.values for one in found])
    means = np.bincount(places, values) / np.bincount(places)
    return clients[np.lexsort((clients, found[0].yardstick.sign * means))]


def _row_label(clients: int) -> str:
    if clients <= _MOST_ROWS:
        return "client, the best at the top"
    return f"share of the {clients:,} clients that tested, the best at the top"


def _draw_panel(
    axes: "Axes", found: ClientFigures, order: np.ndarray, limits: tuple[float, float]
) -> "QuadMesh":
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    places = np.empty(int(order.max()) + 1, dtype=np.int64)
    places[order] = np.arange(len(order))
    height = min(len(order), _MOST_ROWS)
    rows = places[found.clients] * height // len(order)
    rounds, numbers = np.unique(found.rounds, return_inverse=True)
    width = min(len(rounds), _MOST_COLUMNS)
    columns = numbers * width // len(rounds)
    cells = rows * width + columns
    counts = np.bincount(cells, minlength=height * width)
    sums = np.bincount(cells, found.values, minlength=height * width)
    means = np.ma.masked_invalid(np.divide(sums, counts, where=counts > 0, out=np.full(len(sums), np.nan)))
    starts = rounds[np.searchsorted(np.arange(len(rounds)) * width // len(rounds), np.arange(width))]
    sides = np.concatenate(([starts[0] - 0.5], (starts[1:] + starts[:-1]) / 2, [rounds[-1] + 0.5]))
    edges = np.arange(height + 1) - 0.5 if len(order) <= _MOST_ROWS else np.linspace(0, 1, height + 1)
    dark_is_bad = "viridis" if found.yardstick.best == "max" else "viridis_r"
    palette = colormaps[dark_is_bad].with_extremes(bad="#e4e7eb")
    low, high = limits
    image = axes.pcolormesh(
        sides, edges, means.reshape(height, width), cmap=palette, vmin=low, vmax=high, rasterized=True
    )
    axes.set_facecolor("#e4e7eb")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=6))
    if len(order) <= _NAMED:
        axes.set_yticks(range(len(order)), [str(client) for client in order], fontsize=10)
    elif len(order) <= _MOST_ROWS:
        shown = np.arange(0, len(order), -(-len(order) // _NAMED))
        axes.set_yticks(shown, [str(client) for client in order[shown]], fontsize=9)
    return image
