"""The picture of a split: which classes each client has, and how much."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lossworks.reporting.picture_style import BLUE
from lossworks_federated.splits import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 60  # clients that fit as bars; more are drawn as an image
_MOST_COLUMNS = 20_000  # of the image, which has far fewer pixels


def draw_split(split: Split, path: Path, *, title: str, names: tuple[str, ...] | None = None) -> Path:
    """Draw a split as a PNG of 1600 × 800 pixels.

    Up to 60 clients are bars of examples, coloured by class. More are an image of clients × classes, sorted
    by their most frequent class, each client's shares adding up to 1, beside their sizes.

    Args:
        split: What to draw.
        path: File to write, in an existing folder.
        title: Heading.
        names: Of the classes; their numbers if unset.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 8), dpi=100, layout="constrained", facecolor="white")
    found = split.heterogeneity()
    labels = names or tuple(str(number) for number in range(split.counts.shape[1]))
    of_labels = (
        f"distance of labels {found['label_distance']:.2f} · {found['classes']:.1f} classes a client · "
        if split.counts.shape[1] > 1
        else ""
    )
    figure.suptitle(
        f"{title} · {len(split.train)} clients · {of_labels}sizes {found['smallest']:.0f} to "
        f"{found['largest']:.0f}" + (f" · {len(split.left_out)} owners left out" if split.left_out else ""),
        fontsize=15,
        x=0.02,
        ha="left",
    )
    (_draw_bars if len(split.train) <= _MOST else _draw_image)(figure, split.counts, labels)
    figure.savefig(path, format="png")
    return path


def _draw_bars(figure: "Figure", counts: np.ndarray, names: tuple[str, ...]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    colours = colormaps["tab20"].resampled(max(len(names), 2))
    below = np.zeros(len(counts))
    for number, name in enumerate(names):
        axes.bar(range(len(counts)), counts[:, number], 0.85, below, color=colours(number), label=name)
        below += counts[:, number]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="client", ylabel="training rows", xlim=(-0.7, len(counts) - 0.3))
    axes.spines[["top", "right"]].set_visible(False)
    if 1 < len(names) <= 20:
        axes.legend(title="class", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _draw_image(figure: "Figure", counts: np.ndarray, names: tuple[str, ...]) -> None:
    shares = counts / counts.sum(1, keepdims=True)
    order = np.lexsort((-shares.max(1), shares.argmax(1)))
    every = -(-len(order) // _MOST_COLUMNS)
    order = order[::every]
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    image = upper.imshow(
        shares[order].T,
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(-0.5, every * len(order) - 0.5, counts.shape[1] - 0.5, -0.5),
    )
    upper.set(ylabel="class", title="Share of each class in a client's examples")
    if len(names) <= 30:
        upper.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=upper, shrink=0.8)
    places = every * np.arange(len(order))
    lower.fill_between(places, counts[order].sum(1), step="mid", color=BLUE, alpha=0.7)
    few = f"; one in {every} is shown" if every > 1 else ""
    lower.set(xlabel=f"client, sorted by its most frequent class{few}", ylabel="examples", ylim=(0, None))
    lower.spines[["top", "right"]].set_visible(False)
