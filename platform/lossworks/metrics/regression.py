"""Errors of predicted values, from sums that add up."""

import math

import torch
from torch import Tensor

_ROUNDING = 1e-13  # what is left of equal numbers' squares where the square of their sum is taken off


def value_sums(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return count, squared errors, absolute errors, targets and squared targets of a batch, float64 (5,).

    Args:
        predictions: Shape (...).
        targets: NaN where they aren't known, shape (...).
    """
    known = ~targets.isnan()
    y, error = targets[known].double(), (predictions.double() - targets.double())[known]
    sums = (torch.ones_like(y), error.square(), error.abs(), y, y.square())
    return torch.stack([column.sum() for column in sums])


def value_metrics(sums: Tensor, deviation: float = 1.0) -> dict[str, float]:
    """Return the root of the mean squared error, the mean absolute error and R², from sums over all rows.

    R² is 1 − Σ(f − y)²/Σ(y − ȳ)², the share of the targets' variation that is predicted; NaN where they
    don't vary.

    Args:
        sums: As :func:`value_sums` gives them, of values on the scale that was trained on.
        deviation: Of the training targets, by which errors are brought back to that unit.
    """
    n, square, absolute, total, of_squares = sums.tolist()
    n = max(n, 1.0)
    variation = of_squares - total**2 / n
    return {
        "rmse": deviation * math.sqrt(square / n),
        "mae": deviation * absolute / n,
        "r2": 1 - square / variation if variation > _ROUNDING * of_squares else math.nan,
    }
