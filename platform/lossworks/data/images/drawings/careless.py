"""Masks as careless people and simple programs make them, from accurate ones."""

import numpy as np
from scipy import ndimage

from lossworks.data.images.drawings.brush import bent

_APART = 60  # pixels of a mask's border for each part that breaks out


def noisy_mask(stream: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Return a mask (side, side) as somebody would draw it in a hurry.

    Edges are moved smoothly by about 0.8 pixels (one deviation), discs of 1.5 to 3 pixels break out of
    objects, and a third as many spots are added, of the class of some object.
    """
    side = len(mask)
    where = np.clip(np.rint(bent(stream, side, 0.8, 3.0)).astype(np.int64), 0, side - 1)
    found: np.ndarray = mask[tuple(where)]
    border = int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())
    objects = np.argwhere(found > 0)
    if not len(objects):
        return found
    count = int(stream.poisson(border / _APART))
    spots = int(stream.poisson(border / (3 * _APART)))
    classes = mask[mask > 0] if (mask > 0).any() else np.ones(1, dtype=np.int64)
    _stamp(stream, found, stream.choice(objects, count), 0)
    for at in stream.integers(0, side, (spots, 2)):
        _stamp(stream, found, at[None], int(stream.choice(classes)))
    return found


def _stamp(stream: np.random.Generator, mask: np.ndarray, middles: np.ndarray, value: int) -> None:
    """Write a value into discs of 1.5 to 3 pixels around places (n, 2)."""
    side = len(mask)
    for row, column in middles:
        radius = stream.uniform(1.5, 3.0)
        top, left = max(row - 3, 0), max(column - 3, 0)
        window = mask[top : min(row + 4, side), left : min(column + 4, side)]
        down, right = np.ogrid[: window.shape[0], : window.shape[1]]
        window[np.hypot(down + top - row, right + left - column) <= radius] = value


def weak_mask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a mask (side, side) as a simple program would find it, which knows two colours alone.

    Pixels of the image, blurred by a pixel and less the mean of a wide neighbourhood, go to the nearer of
    the mean colours of objects and background; a pixel of an object has the class of the nearest of one.

    Args:
        image: Shape (C, side, side).
        mask: Accurate, int64 (side, side).
    """
    objects = mask > 0
    if objects.all() or not objects.any():
        return mask
    wide = len(mask) / 8
    local = image - ndimage.gaussian_filter(image, (0, wide, wide))
    blurred = ndimage.gaussian_filter(local, (0, 1.0, 1.0))
    means = [local[:, part].mean(1)[:, None, None] for part in (~objects, objects)]
    far, near = (((blurred - mean) ** 2).sum(0) for mean in means)
    nearest = ndimage.distance_transform_edt(~objects, return_distances=False, return_indices=True)
    found: np.ndarray = np.where(near < far, mask[tuple(nearest)], 0)
    return found
