"""What all drawn images are made with: smooth noise, bent places, colours, light."""

import numpy as np
from scipy import ndimage


def smooth_noise(stream: np.random.Generator, side: int, scale: float) -> np.ndarray:
    """Return noise (side, side) of mean about 0 and deviation 1 that changes over ``scale`` pixels.

    What changes slowly is drawn on a coarser grid and read between its places.
    """
    step = max(1, int(scale / 3))
    coarse = -(-side // step) + (step > 1)
    found = ndimage.gaussian_filter(stream.standard_normal((coarse, coarse)), scale / step, mode="reflect")
    if step > 1:
        found = ndimage.zoom(found, side / coarse, order=1, grid_mode=True, mode="nearest")
    spread = float(found.std())
    return np.asarray(found / spread if spread > 0 else found)


def places(side: int) -> np.ndarray:
    """Return the row and the column of every pixel, float64 (2, side, side)."""
    return np.mgrid[:side, :side].astype(np.float64)


def bent(stream: np.random.Generator, side: int, pixels: float, scale: float) -> np.ndarray:
    """Return the places of pixels (2, side, side), moved smoothly by so many pixels (one deviation)."""
    return places(side) + pixels * np.stack([smooth_noise(stream, side, scale) for _ in range(2)])


def coloured(levels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Return levels (H, W) of a colour (3,) as an image (3, H, W)."""
    found: np.ndarray = colour[:, None, None] * levels
    return found


def lit(stream: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    """Return an image (C, H, W) under a light from one side, by which levels differ by up to ``strength``."""
    side = image.shape[-1]
    down, right = places(side) / max(side - 1, 1) - 0.5
    angle = stream.uniform(0, 2 * np.pi)
    found: np.ndarray = image * (1 + strength * (np.sin(angle) * down + np.cos(angle) * right))
    return found


def grained(stream: np.random.Generator, image: np.ndarray, noise: float) -> np.ndarray:
    """Return an image (C, H, W) with noise of a deviation, cut to [0, 1], float32."""
    return np.clip(image + noise * stream.standard_normal(image.shape), 0, 1).astype(np.float32)


def out_of_domain(stream: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Return an image (C, H, W) in [0, 1] as another camera and another light would show it, float32.

    Contrast shrinks to between 35 and 75 % and colours are mixed anew, for one image in three with some of
    its channels turned round; levels are bent, light comes from one side, and there is noise of 0.04.
    """
    channels = len(image)
    middle = image.mean((1, 2), keepdims=True)
    signs = np.where((stream.random(channels) < 0.5) & (stream.random() < 1 / 3), -1.0, 1.0)
    shrunk = (stream.uniform(0.35, 0.75) * signs)[:, None, None] * (image - middle)
    mixed = np.tensordot(_mixing(stream, channels), shrunk, 1)
    levels = np.clip(stream.uniform(0.35, 0.65, channels)[:, None, None] + mixed, 0, 1)
    return grained(stream, lit(stream, levels ** stream.uniform(0.7, 1.5), 0.6), 0.04)


def _mixing(stream: np.random.Generator, channels: int) -> np.ndarray:
    """Return a matrix (C, C) whose rows add up to 1: a channel is most of itself and some of the others."""
    weights = np.eye(channels) + stream.uniform(0, 0.6, (channels, channels))
    mixing: np.ndarray = weights / weights.sum(1, keepdims=True)
    return mixing
