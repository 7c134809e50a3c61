"""How near sharpened bands are to the sharp ones: ERGAS and the spectral angle."""

import math

import torch
from torch import Tensor


def ergas(sharp: Tensor, truth: Tensor, ratio: int) -> float:
    """Return ERGAS, (100/R)·√(mean over bands of MSE/mean²) (Wald 2000); 0 is best.

    Args:
        sharp: Bands, shape (C, H, W).
        truth: Shaped alike; a band whose mean is 0 does not count.
        ratio: R.
    """
    errors = (sharp - truth).double().square().flatten(1).mean(1)
    means = truth.double().flatten(1).mean(1)
    return of_bands(errors[means != 0] / means[means != 0] ** 2, ratio)


def of_bands(relative: Tensor, ratio: int) -> float:
    """Return ERGAS of the MSE/mean² of each band, shape (C,)."""
    return 100 / ratio * math.sqrt(float(relative.mean())) if len(relative) else 0.0


def spectral_angle(sharp: Tensor, truth: Tensor) -> float:
    """Return the mean angle between the spectra of pixels, in degrees; of a pixel without a spectrum 0.

    Args:
        sharp: Bands, shape (C, H, W).
        truth: Shaped alike.
    """
    a, b = sharp.double().flatten(1), truth.double().flatten(1)
    # By the difference of unit vectors: the inverse cosine has no digits left near 1.
    first, second = (x / x.norm(dim=0).clamp(min=torch.finfo(x.dtype).tiny) for x in (a, b))
    known = (a.norm(dim=0) > 0) & (b.norm(dim=0) > 0)
    angles = 2 * torch.asin(((first - second).norm(dim=0) / 2).clamp(max=1))
    return math.degrees(float(torch.where(known, angles, 0).mean()))
