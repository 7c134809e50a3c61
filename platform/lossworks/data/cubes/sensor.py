"""What a sensor does to a sharp band, and how a coarse one is brought to the sharp grid.

Shapes: B bands of h × w coarse or H × W sharp pixels, R = H / h = W / w.
"""

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

NYQUIST_GAIN = 0.3
"""Gain of the sensor's blur at the coarse grid's Nyquist frequency, where none is given."""


def kernel(ratio: int, gain: float, like: Tensor) -> Tensor:
    """Return one axis of the Gaussian whose gain is ``gain`` at frequency 1/(2R), shape (10·R + 1,).

    exp(−2π²σ²f²) = gain at f = 1/(2R) gives σ = (R/π)·√(−2 ln gain).

    Args:
        ratio: R.
        gain: In (0, 1).
        like: Its dtype and device.
    """
    sigma = ratio / math.pi * math.sqrt(-2 * math.log(gain))
    place = torch.arange(-5 * ratio, 5 * ratio + 1, dtype=like.dtype, device=like.device)
    weights = torch.exp(-0.5 * (place / sigma) ** 2)
    return weights / weights.sum()


def blurred(sharp: Tensor, ratio: int, gain: float = NYQUIST_GAIN) -> Tensor:
    """Return bands (B, H, W) as the sensor sees them, before it takes every R-th pixel, (B, H, W)."""
    weights = kernel(ratio, gain, sharp)
    radius = len(weights) // 2
    found = functional.pad(sharp[:, None], (radius,) * 4, mode="replicate")
    found = functional.conv2d(found, weights.reshape(1, 1, -1, 1))
    return functional.conv2d(found, weights.reshape(1, 1, 1, -1))[:, 0]


def decimated(bands: Tensor, ratio: int) -> Tensor:
    """Return every R-th pixel of bands (B, H, W), beginning with pixel R // 2, (B, h, w)."""
    first = ratio // 2
    return bands[:, first::ratio, first::ratio]


def interpolated(coarse: np.ndarray, ratio: int) -> np.ndarray:
    """Return bands (B, h, w) on the sharp grid by cubic splines, (B, R·h, R·w)."""
    axes = [(np.arange(ratio * side) - ratio // 2) / ratio for side in coarse.shape[1:]]
    where = np.meshgrid(*axes, indexing="ij")
    return np.stack([ndimage.map_coordinates(band, where, order=3, mode="nearest") for band in coarse])
