"""Regression: squared, absolute, Huber's and quantile errors.

Shapes: any number of leading axes (...), m outputs a value: one, or one for each quantile.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Case, Paper, number, numbers
from lossworks.errors import UserError
from lossworks.losses.interface import Context
from lossworks.losses.rows import wide
from lossworks.losses.value_head import ValueLoss

_LARGE, _SMALL = 1e6, 1e-6  # of a δ that stands for ∞ and 0


class SquaredError(ValueLoss):
    """Squared error, whose least is at the mean."""

    slug = "squared-error"
    formula = "(f - y)²"
    paper = Paper("Nouvelles méthodes pour la détermination des orbites des comètes", "Legendre", 1805)

    def values(self, outputs: Tensor, targets: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """See :meth:`ValueLoss.values`."""
        return (outputs[..., 0] - targets).square()


class AbsoluteError(ValueLoss):
    """Absolute error, whose least is at the median."""

    slug = "absolute-error"
    formula = "|f - y|"
    paper = Paper("Regression Quantiles", "Koenker, Bassett", 1978, "θ = 1/2, the least absolute error")

    def values(self, outputs: Tensor, targets: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """See :meth:`ValueLoss.values`."""
        return (outputs[..., 0] - targets).abs()


class Huber(ValueLoss):
    """Huber's loss: half the squared error up to δ, and from there on a straight line of slope δ.

    So no target pulls harder than δ, however far away it is.
    """

    slug = "huber"
    formula = "u²/2 if |u| ≤ δ else δ (|u| - δ/2), u = f - y"
    paper = Paper("Robust Estimation of a Location Parameter", "Huber", 1964, "the loss ρ, with k for δ")
    cases = (
        Case({"delta": _LARGE}, "squared-error", scale=0.5),
        Case({"delta": _SMALL}, "absolute-error", scale=_SMALL, constant=-(_SMALL**2) / 2),
    )

    delta: float = number(
        1.0,
        "δ, in the targets' unit: ∞ is half the squared error, 0 is δ times the absolute error",
        gt=0,
        search=(0.01, 10),
        log=True,
    )

    def values(self, outputs: Tensor, targets: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """See :meth:`ValueLoss.values`."""
        return torch.nn.functional.huber_loss(outputs[..., 0], targets, reduction="none", delta=self.delta)


class Quantile(ValueLoss):
    """Quantile loss (pinball): the head gives a quantile for each level, each error weighing by its side.

    A target above the τ-quantile costs τ, one below it 1 - τ, per unit of distance; the mean over levels is
    half the continuous ranked probability score, as their number grows.
    """

    slug = "quantile"
    formula = "mean over τ of max(τ u, (τ - 1) u), u = y - f_τ"
    paper = Paper("Regression Quantiles", "Koenker, Bassett", 1978, "section 2")
    cases = (Case({"levels": [0.5]}, "absolute-error", scale=0.5),)

    levels: tuple[float, ...] = numbers(
        (0.1, 0.5, 0.9), "τ: levels of the quantiles, ascending; the head has an output for each", gt=0, lt=1
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.levels or any(low >= high for low, high in pairwise(self.levels)):
            raise UserError(f"{self.slug}: levels={list(self.levels)} must be one or more, and ascend")

    @property
    def outputs(self) -> int:
        """Return the number of levels."""
        return len(self.levels)

    def values(self, outputs: Tensor, targets: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """See :meth:`ValueLoss.values`."""
        above = targets[..., None] - outputs
        levels = torch.tensor(self.levels, dtype=outputs.dtype, device=outputs.device)
        return torch.maximum(levels * above, (levels - 1) * above).mean(-1)

    def quantiles(self, outputs: Tensor) -> Tensor:
        """Return the quantiles of all levels, shape (..., m), float32 at least, which don't cross.

        They are the outputs in ascending order, which are nearer to the true quantiles than outputs that
        cross (Chernozhukov, Fernández-Val, Galichon, Quantile and Probability Curves Without Crossing, 2010).

        Args:
            outputs: Of the head, shape (..., m).

        Raises:
            UserError: There are more or fewer outputs a value.
        """
        self.require_outputs(outputs)
        return wide(outputs).sort(-1).values

    def decode(self, outputs: Tensor) -> Tensor:
        """Return the quantile of the level nearest to the median's, shape (...), float32 at least."""
        nearest = min(range(self.outputs), key=lambda index: abs(self.levels[index] - 0.5))
        return self.quantiles(outputs)[..., nearest]
