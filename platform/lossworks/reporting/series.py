"""Curves out of the rows of a journal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Series = tuple[NDArray[np.float64], NDArray[np.float64]]


def series(rows: Sequence[Mapping[str, Any]], name: str) -> Series | None:
    """Return the steps and values of one metric, or None when it has no finite value.

    Values that are not finite are left out, and with them their steps.
    """
    points = [(row["step"], row["metrics"][name]) for row in rows if name in row["metrics"]]
    points = sorted((step, value) for step, value in points if math.isfinite(value))
    if not points:
        return None
    steps, values = np.asarray(points, dtype=np.float64).T
    return steps, values


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the values averaged over their neighbours, nearer ones weighing more.

    m(i) = Σ w(i−j)·v(j) / Σ w(i−j) with w(d) = max(0, 1 − |d|/window). It is centred and so does not lag
    behind a falling loss; the division takes care of both ends.

    Args:
        values: Shape (n,), finite.
        window: Points on either side that count, at least 1.
    """
    weights = 1 - np.abs(np.arange(1 - window, window)) / window
    sums = np.convolve(values, weights)[window - 1 : window - 1 + values.size]
    norms = np.convolve(np.ones_like(values), weights)[window - 1 : window - 1 + values.size]
    return sums / norms
