"""Means over seeds with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MeanInterval:
    """A mean with the half width of its 95 % interval (Student's t), None for one value."""

    value: float
    half_width: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "MeanInterval | None":
        """Return the mean of finite values, or None if there are none."""
        from scipy.stats import t

        found = np.array([value for value in values if math.isfinite(value)])
        if not len(found):
            return None
        half = None
        if len(found) > 1:
            half = float(t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
        return cls(float(found.mean()), half, len(found))

    @property
    def includes_zero(self) -> bool:
        """Return whether 0 is inside the interval, or no interval is known: a difference is a tie then."""
        return self.half_width is None or abs(self.value) <= self.half_width

    def text(self, form: str = "{:.4f}") -> str:
        """Return mean ± half width."""
        shown = form.format(self.value)
        return shown if self.half_width is None else f"{shown} ± {form.format(self.half_width)}"
