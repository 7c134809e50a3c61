"""How much a final loss depends on the learning rate."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lossworks.catalogue.declaration import Paper, choice, number, numbers
from lossworks.errors import UserError
from lossworks.tasks.analyses import Analysis, Curve, Finding, RunCurves

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
    example = "lossworks analyse {slug} RUN RUN"
    subject = "runs"
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
    figure: str = choice(
        "eval/loss",
        "what is taken for the loss, at the end of each run",
        ("eval/loss", "eval/cross_entropy", "train/loss"),
    )
    initial: float | None = number(
        None, "ℓ_0, the loss at initialisation; null takes the first training loss of the runs", optional=True
    )

    def compare(self, runs: Sequence[RunCurves]) -> Finding:
        """Return the sensitivity over the learning rates of runs, one sensitivity for each group of names.

        Runs of one model differ in ``optimizer.lr`` alone; where other fields differ too, runs are grouped by
        those, and each group is a curve of the picture.

        Raises:
            UserError: There are fewer than two learning rates.
        """
        curves: dict[str, dict[float, float]] = {}
        for run in runs:
            own = curves.setdefault(_group(run, runs), {})
            own[run.spec.optimizer.lr] = run.last(self.figure)
        if max(map(len, curves.values()), default=0) < 2:
            raise UserError(f"{self.slug}: needs runs of at least two learning rates, optimizer.lr")
        initial = self.initial
        if initial is None:
            initial = max(float(run.curves["train/loss"][1][0]) for run in runs)
        figures = {f"{name}/sensitivity": lr_sensitivity(losses, initial) for name, losses in curves.items()}
        plain = {name: [[rate, losses[rate]] for rate in sorted(losses)] for name, losses in curves.items()}
        return Finding(figures, {"curves": plain, "initial": initial})

    def draw(self, pictured: Mapping[str, Any], curves: Mapping[str, Curve]) -> "Figure | None":
        """See :meth:`Analysis.draw`."""
        del curves
        found = {name: dict(map(tuple, points)) for name, points in pictured["curves"].items()}
        return self.draw_curves(found, float(pictured["initial"]))

    def of_grid(self, losses: Mapping[float, float], initial: float) -> float:
        """Return the sensitivity over the grid; arguments as for :func:`lr_sensitivity`.

        Raises:
            UserError: A rate of the grid has no loss.
        """
        missing = [rate for rate in self.grid if rate not in losses]
        if missing:
            raise UserError(f"lr-sensitivity: there is no loss for the learning rate {missing[0]:g}")
        return lr_sensitivity({rate: losses[rate] for rate in self.grid}, initial)

    @staticmethod
    def draw_curves(curves: Mapping[str, Mapping[float, float]], initial: float) -> "Figure":
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


def _group(run: RunCurves, runs: Sequence[RunCurves]) -> str:
    """Return the fields, but learning rate and names, in which runs differ, as this run has them."""
    apart = ("name", "optimizer.lr", "storage", "tracking.")
    flat = [other.spec.flat() for other in runs]
    names = [name for name in flat[0] if not name.startswith(apart)]
    differing = [name for name in names if any(one.get(name) != flat[0][name] for one in flat)]
    own = run.spec.flat()
    return ", ".join(f"{name}={own.get(name)}" for name in differing) or "runs"
