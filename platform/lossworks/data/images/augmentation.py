"""Patches and changes by chance of an image and its mask: a function of a random stream and nothing else."""

import colorsys

import numpy as np

from lossworks.data.batch import IGNORE_INDEX
from lossworks.specs.tasks.segmentation import AugmentationSpec


def levels(image: np.ndarray) -> np.ndarray:
    """Return an image as float32: whole numbers of 8 or 16 bits from 0 to 1, other numbers as they are."""
    whole = image.dtype in (np.uint8, np.uint16)
    scaled: np.ndarray = image.astype(np.float32)
    return scaled / np.float32(np.iinfo(image.dtype).max) if whole else scaled


def changed(
    image: np.ndarray, mask: np.ndarray, spec: AugmentationSpec, patch: int, stream: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return a patch of an image, or all of it, after the changes of a spec, and its mask.

    Args:
        image: Shape (C, H, W), any numbers.
        mask: Shape (H, W), classes, or -100 for what counts for nothing.
        spec: What may be changed.
        patch: Pixels a side; 0 for the whole image. What lies beyond the border repeats its last pixels and
            counts for nothing.
        stream: What is drawn from.

    Returns:
        The image (C, h, w), float32, and the mask (h, w), of the mask's own type; h = w = patch, or H and W.
    """
    rows, columns = _grid(mask.shape, patch, spec.scale, stream)
    image, mask = _between(image, rows, columns), _nearest(mask, rows, columns)
    if spec.flip:
        axes = tuple(axis for axis in (-2, -1) if stream.random() < 0.5)
        image, mask = np.flip(image, axes), np.flip(mask, axes)
    if spec.turn:
        quarters = int(stream.integers(4)) if mask.shape[0] == mask.shape[1] else 2 * int(stream.integers(2))
        image, mask = (np.rot90(array, quarters, (-2, -1)) for array in (image, mask))
    return _recoloured(image, spec, stream), mask


def _grid(
    size: tuple[int, ...], patch: int, scale: float, stream: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return which row (h,) and column (w,) of the image each one of the result shows, real numbers."""
    step = _factor(scale, stream)
    return tuple(_line(length, patch or length, step, stream) for length in size)  # type: ignore[return-value]


def _line(length: int, shown: int, step: float, stream: np.random.Generator) -> np.ndarray:
    room = length - shown * step  # where there is none, the image lies in the middle
    if step == 1:
        first = float(stream.integers(0, int(room) + 1) if room >= 0 else room // 2)
    else:
        first = stream.uniform(0, room) if room >= 0 else room / 2
    found: np.ndarray = first + step * (np.arange(shown) + 0.5) - 0.5
    return found


def _factor(most: float, stream: np.random.Generator) -> float:
    """Return a factor between 1/most and most, log-uniform; 1 without drawing where most is 1."""
    return float(np.exp(stream.uniform(-np.log(most), np.log(most)))) if most > 1 else 1.0


def _nearest(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return a mask at the pixels nearest to rows and columns, -100 beyond its border."""
    down, right = (np.floor(line + 0.5).astype(np.int64) for line in (rows, columns))
    inside = ((down >= 0) & (down < mask.shape[0]))[:, None] & ((right >= 0) & (right < mask.shape[1]))
    found = mask[np.clip(down, 0, mask.shape[0] - 1)[:, None], np.clip(right, 0, mask.shape[1] - 1)]
    return np.where(inside, found, np.array(IGNORE_INDEX, dtype=mask.dtype))


def _between(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the levels of an image at rows and columns, in proportion to how near four pixels are."""
    down, right = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    low, left = (rows - down).astype(np.float32)[:, None], (columns - right).astype(np.float32)

    def at(further_down: int, further_right: int) -> np.ndarray:
        row = np.clip(down + further_down, 0, image.shape[1] - 1)
        column = np.clip(right + further_right, 0, image.shape[2] - 1)
        return levels(image[:, row[:, None], column])

    if not low.any() and not left.any():
        return at(0, 0)
    upper, lower = ((1 - left) * at(row, 0) + left * at(row, 1) for row in (0, 1))
    found: np.ndarray = (1 - low) * upper + low * lower
    return found


def _recoloured(image: np.ndarray, spec: AugmentationSpec, stream: np.random.Generator) -> np.ndarray:
    if spec.random_hue and stream.random() < 0.5:
        image = with_hue(image, stream.random(), *stream.uniform(0, 0.5, 2))
    if spec.contrast > 1:
        middle = image.mean((1, 2), keepdims=True)
        image = middle + np.float32(_factor(spec.contrast, stream)) * (image - middle)
    if spec.brightness:
        image = image + np.float32(stream.uniform(-spec.brightness, spec.brightness))
    return image


def with_hue(image: np.ndarray, hue: float, saturation: float, value: float) -> np.ndarray:
    """Return an image (3, H, W) in [0, 1] with one hue for all pixels (TopoMortar's random hue).

    Args:
        image: Red, green and blue.
        hue: From 0 to 1, once round the colours.
        saturation: What is added to every pixel's saturation, which ends at 1.
        value: The same for its value, the largest of its three levels.
    """
    most, least = image.max(0), image.min(0)
    spread = np.divide(most - least, most, out=np.zeros_like(most), where=most > 0)
    saturated, bright = np.clip(spread + saturation, 0, 1), np.clip(most + value, 0, 1)
    pure = np.array(colorsys.hsv_to_rgb(hue, 1.0, 1.0), dtype=np.float32)[:, None, None]
    found: np.ndarray = bright * (1 - saturated * (1 - pure))
    return found.astype(np.float32)
