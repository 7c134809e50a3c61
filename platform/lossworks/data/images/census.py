"""What there is in images with masks: how many, how large, which classes, and what is odd."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lossworks.data.batch import IGNORE_INDEX
from lossworks.data.images.mask_sources import ReadMasks

_RARE = 0.001  # share of pixels below which a class is hard to learn


class Census(NamedTuple):
    """Images and masks in numbers.

    Attributes:
        summary: One line.
        classes: Of each class its name, its share of the pixels that count, and how many images show it.
        notes: What is odd, a sentence each.
    """

    summary: str
    classes: tuple[tuple[str, float, int], ...]
    notes: tuple[str, ...]


def count_masks(found: ReadMasks) -> Census:
    """Return what there is in images and masks."""
    pixels = np.stack([_counts(mask, len(found.names)) for mask in found.masks])
    total = pixels.sum(0)
    shares = total / max(total.sum(), 1)
    images = (pixels > 0).sum(0)
    classes = tuple(zip(found.names, shares.tolist(), images.tolist(), strict=True))
    sizes = sorted({mask.shape for mask in found.masks})
    ignored = sum(int((mask == IGNORE_INDEX).sum()) for mask in found.masks)
    first, last = (" x ".join(map(str, size)) for size in (sizes[0], sizes[-1]))
    size = f"{first} pixels" if len(sizes) == 1 else f"{first} to {last} pixels"
    summary = f"{len(found.masks)} images, {size}, {_channels(len(found.images[0]))}"
    if ignored:
        summary += f"; {100 * ignored / (ignored + total.sum()):.2f} % of pixels count for nothing"
    return Census(summary, classes, (*found.notes, *_odd(found, pixels, len(sizes))))


def _counts(mask: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(mask[mask != IGNORE_INDEX].ravel(), minlength=classes)


def _channels(count: int) -> str:
    return {1: "grey", 3: "three colours"}.get(count, f"{count} channels")


def _odd(found: ReadMasks, pixels: np.ndarray, sizes: int) -> list[str]:
    """Return a sentence on everything about masks and images that training may trip over."""
    notes = []
    if sizes > 1:
        notes.append("images differ in size: training takes patches of them, such as data.patch=64")
    plain = [image.min() == image.max() for image in found.images]
    notes += _named("one level everywhere in the image", found.keys, plain)
    notes += _named("one class alone in the mask", found.keys, (pixels > 0).sum(1) == 1)
    notes += _named("no pixel that counts in the mask", found.keys, pixels.sum(1) == 0)
    few = pixels.sum(0) < _RARE * max(pixels.sum(), 1)
    rare = [name for name, one in zip(found.names, few, strict=True) if one]
    notes += [f"class {name}: less than {_RARE:.1%} of pixels" for name in rare]
    return notes


def _named(what: str, keys: Sequence[str], chosen: Sequence[bool] | np.ndarray) -> list[str]:
    """Return a sentence that counts images and names some, or nothing where there are none."""
    names = [key for key, one in zip(keys, chosen, strict=True) if one]
    more = ", …" if len(names) > 3 else ""
    return [f"{len(names)} of {len(keys)} images have {what}: {', '.join(names[:3])}{more}"] if names else []
