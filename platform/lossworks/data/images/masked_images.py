"""Images with a class for each pixel in memory, read by row or by visit."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossworks.data.batch import IGNORE_INDEX
from lossworks.data.images.augmentation import changed, levels
from lossworks.data.images.picture_files import of_channels, read_picture
from lossworks.data.standardise import Standardisation
from lossworks.specs.tasks.segmentation import AugmentationSpec

_VISIT = 77  # what a random stream is for: others of the same seed have other numbers in this place


class Visiting(NamedTuple):
    """What is done to an image each time that it is visited.

    Attributes:
        augment: What may be changed.
        patch: Pixels a side of the part that is taken; 0 for the whole image.
        seed: Together with the number of the visit it decides what is drawn.
    """

    augment: AugmentationSpec
    patch: int
    seed: int


class MaskedImages:
    """Images with masks, whose batches are images and classes of pixels.

    Args:
        images: N arrays (C, H, W), of 8 or 16 bits or real numbers; sizes may differ.
        masks: N arrays (H, W) of classes; -100 for what counts for nothing.
        keys: What the images are called, N texts.
        scale: What brings levels to the model's scale, if anything.
        visiting: What is done at each visit; None where images are taken as they are.
        priors: Shares of the classes that each image is expected to have, (N, K); None where nobody said.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        keys: Sequence[str],
        scale: Standardisation | None = None,
        visiting: Visiting | None = None,
        priors: np.ndarray | None = None,
    ) -> None:
        self.images, self.masks, self.keys = list(images), list(masks), tuple(keys)
        self.scale, self.visiting, self.priors = scale, visiting, priors

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, which lie in memory."""
        return sum(array.nbytes for array in (*self.images, *self.masks))

    def pixels_of_classes(self, classes: int) -> np.ndarray:
        """Return how many pixels there are of each class, int64 (classes,)."""
        found = np.zeros(classes, dtype=np.int64)
        for mask in self.masks:
            found += np.bincount(mask[mask != IGNORE_INDEX].ravel(), minlength=classes)
        return found

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return ``inputs`` (B, C, H, W) float32 and ``targets`` (B, H, W) int64 of rows or visits (B,).

        The row of a visit is its remainder by N. Smaller images than the largest of the batch are continued
        to the right and below with their last pixels, which count for nothing (-100).

        Args:
            rows: int64; where there is something to do at visits, epoch · N + row.
        """
        pairs = [self.pair(int(row)) for row in rows]
        height, width = (max(mask.shape[axis] for _, mask in pairs) for axis in (0, 1))
        padded = [_padded(image, mask, height, width) for image, mask in pairs]
        inputs = np.stack([image for image, _ in padded])
        targets = np.stack([mask for _, mask in padded]).astype(np.int64)
        found = {"inputs": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}
        if self.priors is not None:
            found["priors"] = torch.from_numpy(self.priors[rows % len(self)])
        return found

    def pair(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image (C, H, W), float32 on the model's scale, and mask (H, W) of a row or visit."""
        at = row % len(self)
        image, mask = self.images[at], self.masks[at]
        if self.visiting is None:
            image = levels(image)
        else:
            stream = np.random.default_rng([self.visiting.seed, row, _VISIT])
            image, mask = changed(image, mask, self.visiting.augment, self.visiting.patch, stream)
        return scaled_image(image, self.scale), mask


def read_input(path: Path, channels: int, scale: Standardisation | None, whose: str) -> np.ndarray:
    """Return the image of a file as a model reads it, float32 (C, H, W).

    Args:
        path: A picture, or an array in an NPY file.
        channels: That the model takes, C.
        scale: The model's, if it has one.
        whose: What messages call the model's images, such as ``those of run 7``.

    Raises:
        UserError: It can't be read, or has other channels.
    """
    image = of_channels(read_picture(path, str(path)).image, channels, str(path), whose)
    return scaled_image(levels(image), scale)


def scaled_image(image: np.ndarray, scale: Standardisation | None) -> np.ndarray:
    """Return levels (C, H, W) on a model's scale, float32."""
    if scale is None:
        return np.ascontiguousarray(image, dtype=np.float32)
    return np.ascontiguousarray(scale(image[None])[0], dtype=np.float32)


def _padded(image: np.ndarray, mask: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    further = (0, height - mask.shape[0]), (0, width - mask.shape[1])
    if not any(map(any, further)):
        return image, mask
    return np.pad(image, ((0, 0), *further), mode="edge"), np.pad(mask, further, constant_values=IGNORE_INDEX)
