"""The reliability diagram: how often a classifier is right, by how sure it is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lossworks.reporting.picture_style import BLUE, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_reliability(axes: "Axes", curve: Mapping[str, Sequence[float]] | None) -> None:
    """Draw accuracy over confidence, each bin a disc that grows with its share of the examples.

    Args:
        axes: Where.
        curve: ``examples``, ``confidence`` and ``accuracy`` by bin; None or empty if not measured.
    """
    axes.set_title("Reliability at the last evaluation")
    axes.plot((0, 1), (0, 1), color=GREY, linestyle="--", linewidth=1.2, label="calibrated")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.04), ylim=(-0.04, 1.08))
    if not curve or not curve["examples"]:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    total = sum(curve["examples"])
    areas = [30 + 900 * count / total for count in curve["examples"]]
    axes.plot(curve["confidence"], curve["accuracy"], color=BLUE, alpha=0.4, linewidth=1.2)
    axes.scatter(curve["confidence"], curve["accuracy"], s=areas, color=BLUE, alpha=0.75)
    axes.set_xlabel(f"confidence ({total:,.0f} examples; larger discs hold more)")
    axes.legend(loc="lower right")
