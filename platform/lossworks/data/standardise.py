"""Inputs of one scale: mean 0 and deviation 1 over the training examples."""

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
        deviation = wide.std(axes)
        return cls(wide.mean(axes), np.where(deviation > 0, deviation, 1))

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Self:
        """Return what :meth:`plain` gave.

        Raises:
            KeyError, TypeError, ValueError: Something is missing or damaged.
        """
        mean, deviation = (np.array(values[name], dtype=np.float64) for name in ("mean", "deviation"))
        return cls(mean, deviation)

    def plain(self) -> dict[str, list[float]]:
        """Return mean and deviation as plain data."""
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Return examples (N, F, …) brought to that scale.

        Returns:
            Shape (N, F, …), float64: in float32 a large mean would round the examples' differences away.
        """
        shape = (1, -1, *[1] * (inputs.ndim - 2))
        scaled: np.ndarray = (inputs - self.mean.reshape(shape)) / self.deviation.reshape(shape)
        return scaled


def to_float32(inputs: np.ndarray) -> np.ndarray:
    """Return inputs (N, …) as float32.

    Raises:
        UserError: They hold numbers that float32 can't.
    """
    with np.errstate(over="ignore"):
        narrow = inputs.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise UserError("the inputs hold numbers beyond ±3.4e38; scale them down")
    return narrow
