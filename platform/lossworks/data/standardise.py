"""Inputs of one scale: mean 0 and deviation 1 over the training examples."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from lossworks.errors import UserError


@dataclass(frozen=True, eq=False)  # arrays have no equality that gives one bool
class Standardisation:
    """Mean and deviation of training data: per feature, or per channel.

    Attributes:
        mean: Shape (F), float64.
        deviation: Shape (F), float64; of a feature that is constant 1, so that it is only shifted.
    """

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, training: np.ndarray) -> Self:
        """Return that of examples (M, F, …)."""
        axes = (0, *range(2, training.ndim))
        wide = training.astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of columns that are empty in all these rows: they count as 0
            mean, deviation = np.nanmean(wide, axes), np.nanstd(wide, axes)
            # Not by the deviation, which rounding makes 4e-15 where all values are alike.
            varies = np.nanmax(wide, axes) > np.nanmin(wide, axes)
        return cls(np.nan_to_num(mean), np.where(varies, deviation, 1))

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Self:
        """Return what :meth:`plain` gave.

        Raises:
            KeyError, TypeError, ValueError: Something is missing or damaged.
            UserError: A deviation is none, or there are more of one than of the other.
        """
        mean, deviation = (np.array(values[name], dtype=np.float64) for name in ("mean", "deviation"))
        if mean.shape != deviation.shape or not (np.isfinite(mean).all() and (deviation > 0).all()):
            raise UserError("standardisation: is damaged: means must be finite, and deviations above 0")
        return cls(mean, deviation)

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Self | None:
        """Return that which facts hold as ``standardisation``, if any."""
        values = facts.get("standardisation")
        return None if values is None else cls.of_plain(values)

    def plain(self) -> dict[str, list[float]]:
        """Return mean and deviation as plain data."""
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Return examples (N, F, …) brought to that scale; the mean stands in for NaN, a missing cell.

        Returns:
            Shape (N, F, …), float64: in float32 a large mean would round the examples' differences away.
        """
        shape = (1, -1, *[1] * (inputs.ndim - 2))
        scaled: np.ndarray = (inputs - self.mean.reshape(shape)) / self.deviation.reshape(shape)
        return np.where(np.isnan(inputs), 0.0, scaled) if np.isnan(scaled).any() else scaled


def to_float32(inputs: np.ndarray) -> np.ndarray:
    """Return inputs (N, …) as float32.

    Raises:
        UserError: They hold numbers that float32 can't.
    """
    with np.errstate(over="ignore"):
        narrow = inputs.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise UserError("the data hold numbers beyond ±3.4e38; scale them down")
    if inputs.any() and not narrow.any():
        raise UserError("the data hold numbers below ±1e-45 alone, which float32 takes for 0; scale them up")
    return narrow
