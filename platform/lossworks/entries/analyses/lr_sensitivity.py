"""How much a final loss depends on the learning rate."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lossworks.catalogue.declaration import Paper, numbers
from lossworks.errors import UserError
from lossworks.losses.methods import Analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def lr_sensitivity(losses: Mapping[float, float], initial: float) -> float:
    """Return the mean over learning rates of min(ℓ(η), ℓ_0) − min_η ℓ(η), in the loss's unit.

    Args:
        losses: Final validation loss ℓ by learning rate η; NaN and infinities count as ℓ_0.
        initial: ℓ_0, the loss at initialisation.

    Returns:
        0 where every rate ends alike, also where none has learned: read it beside the curve.

    Raises:
        UserError: There is no learning rate, or ``initial`` is not finite.
    """
    if not losses:
        raise UserError("lr-sensitivity: there is no loss of any learning rate")
    if not math.isfinite(initial):
        raise UserError(f"lr-sensitivity: initial={initial} must be finite")
    ends = [min(loss, initial) if math.isfinite(loss) else initial for loss in losses.values()]
    return sum(ends) / len(ends) - min(ends)


class LRSensitivity(Analysis):
    """Learning-rate sensitivity: by how much a rate off the best one costs, over three decades."""

    slug = "lr-sensitivity"
    formula = "mean over η of min(ℓ(η), ℓ_0) - min over η of ℓ(η)"
    paper = Paper(
        "Small-scale proxies for large-scale Transformer training instabilities",
        "Wortsman et al.",
        2023,
        "section 2.2",
    )

    grid: tuple[float, ...] = numbers(
        _GRID, "η: learning rates to train with; shift them with the optimum", gt=0
    )

    def measure(self, losses: Mapping[float, float], initial: float) -> float:
        """Return the sensitivity over the grid; arguments as for :func:`lr_sensitivity`.

        Raises:
            UserError: A rate of the grid has no loss.
        """
        missing = [rate for rate in self.grid if rate not in losses]
        if missing:
            raise UserError(f"lr-sensitivity: there is no loss for the learning rate {missing[0]:g}")
        return lr_sensitivity({rate: losses[rate] for rate in self.grid}, initial)

    def draw(self, curves: Mapping[str, Mapping[float, float]], initial: float) -> "Figure":
        """Return a picture of final loss against learning rate, a curve a model, with its sensitivity.

        Args:
            curves: Final losses by learning rate, by name.
            initial: ℓ_0, drawn as the ceiling at which curves are cut off.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
        axes = figure.subplots()
        for name, losses in curves.items():
            rates = sorted(losses)
            ends = [min(losses[r], initial) if math.isfinite(losses[r]) else initial for r in rates]
            sensitivity = lr_sensitivity(losses, initial)
            axes.plot(rates, ends, marker="o", label=f"{name}: sensitivity {sensitivity:.3f}")
        axes.axhline(initial, color="#9aa3ad", linestyle="--", linewidth=1, label="at initialisation")
        axes.set(xscale="log", xlabel="learning rate", ylabel="final loss")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        return figure
