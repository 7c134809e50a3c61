"""Branching vessels that taper, as on a retina."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from lossworks.data.images.drawings.brush import coloured, grained, lit, smooth_noise

_THINNEST = 0.7  # pixels, of a vessel's half width


class Vessels(NamedTuple):
    """Vessels without their colours.

    Attributes:
        mask: 1 where there is a vessel, int64 (side, side).
        depth: How dark it is there, from 0 outside to 1 in the middle of the widest, (side, side).
    """

    mask: np.ndarray
    depth: np.ndarray


def grow_vessels(stream: np.random.Generator, side: int) -> Vessels:
    """Return two or three trees of vessels that come in from the border and branch up to four times."""
    radii = np.zeros((side, side))
    for _ in range(stream.integers(2, 4)):
        _grow_tree(stream, radii)
    distance, nearest = ndimage.distance_transform_edt(radii == 0, return_indices=True)
    around = radii[tuple(nearest)]
    mask = distance <= np.maximum(around - 0.5, 0)
    depth = np.clip(around / (side / 40), 0.5, 1) * mask
    return Vessels(mask.astype(np.int64), depth)


def paint_vessels(stream: np.random.Generator, vessels: Vessels) -> np.ndarray:
    """Return an image (3, side, side) of vessels, float32 in [0, 1]: they are dark, thin ones less."""
    side = vessels.mask.shape[0]
    ground = np.array([stream.uniform(0.65, 0.85), stream.uniform(0.35, 0.5), stream.uniform(0.15, 0.3)])
    clouds = 1 + 0.10 * smooth_noise(stream, side, side / 10) + 0.04 * smooth_noise(stream, side, side / 40)
    shade = stream.uniform(0.35, 0.6) * ndimage.gaussian_filter(vessels.depth, 0.4)
    dark = np.array([0.55, 1.0, 0.9])  # red stays brightest
    image = coloured(clouds, ground) * (1 - dark[:, None, None] * shade)
    return grained(stream, lit(stream, image, 0.5), 0.06)


def _grow_tree(stream: np.random.Generator, radii: np.ndarray) -> None:
    """Write half widths along the middles of a tree's branches into an array (side, side) of zeros."""
    side = len(radii)
    start, heading = _root(stream, side)
    waiting = [(start, heading, side * stream.uniform(0.022, 0.034), 0)]
    while waiting:
        at, heading, radius, depth = waiting.pop()
        path, heading = _branch(stream, at, heading, side * stream.uniform(0.15, 0.32))
        thinner = np.maximum(radius * np.linspace(1, 0.8, len(path)), _THINNEST)
        _write(radii, path, thinner)
        if depth < 4 and (path[-1] >= 0).all() and (path[-1] < side).all():
            split = stream.uniform(0.25, 0.75, 2) * (1, -1)
            waiting += [
                (path[-1], heading + turn, thinner[-1] * stream.uniform(0.65, 0.9), depth + 1)
                for turn in split
            ]


def _root(stream: np.random.Generator, side: int) -> tuple[np.ndarray, float]:
    """Return where on the border a tree comes in, (2,) row and column, and the angle in which it grows."""
    along, border = stream.uniform(0.15, 0.85) * side, int(stream.integers(4))
    starts = ((0.0, along), (along, 0.0), (side - 1.0, along), (along, side - 1.0))
    towards = side * stream.uniform(0.35, 0.65, 2) - starts[border]
    return np.array(starts[border]), float(np.arctan2(*towards))


def _branch(
    stream: np.random.Generator, start: np.ndarray, heading: float, length: float
) -> tuple[np.ndarray, float]:
    """Return the places of a winding line (n, 2), half a pixel apart, and the angle at its end."""
    steps = max(int(2 * length), 2)
    angles = heading + np.cumsum(0.06 * stream.standard_normal(steps))
    moves = 0.5 * np.stack((np.sin(angles), np.cos(angles)), axis=1)
    return start + np.cumsum(moves, axis=0), float(angles[-1])


def _write(radii: np.ndarray, path: np.ndarray, widths: np.ndarray) -> None:
    """Keep the larger of what is there and a path's half widths, where it lies in the array."""
    rows, columns = np.rint(path).astype(np.int64).T
    inside = (rows >= 0) & (columns >= 0) & (rows < len(radii)) & (columns < len(radii))
    np.maximum.at(radii, (rows[inside], columns[inside]), widths[inside])
