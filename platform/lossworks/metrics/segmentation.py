"""How good predicted masks are: overlap, boundaries and topology, from sums that add up over images.

B images of H by W pixels, K classes of which the first is the background. Cross-entropy, accuracy and
calibration of the pixels are those of any classes: see ``class_sums``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossworks.adapters.torch_private import shapes_alone
from lossworks.data.batch import IGNORE_INDEX
from lossworks.errors import UserError
from lossworks.metrics.betti_matching import betti_matching_error
from lossworks.metrics.betti_numbers import betti_numbers
from lossworks.metrics.persistence import Connectivity

_HEAD, _COLUMNS = 6, 7
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class MapSums:
    """Sums over images, as one vector of 6 + 7·K float64.

    Attributes:
        values: Images of which a pixel counts; their Betti number errors of components and of holes; images
            whose Betti matching was taken; their Betti matching errors of both. Then for every class the
            pixels that are both predicted and actual, predicted, actual; the pixels of the predicted
            boundary, those of them near the actual one, the pixels of the actual boundary, those of them
            near the predicted one.
    """

    values: Tensor

    def by_class(self) -> dict[str, list[float]]:
        """Return ``dice``, ``iou`` and ``boundary_f`` of each class, (K,); NaN of classes that are nowhere.

        A class is there if a mask or a prediction has it.
        """
        both, predicted, actual, drawn, near_actual, there, near_drawn = self._classes()
        found = {
            "dice": 2 * both / (predicted + actual),
            "iou": both / (predicted + actual - both),
            "boundary_f": _harmonic(_share(near_actual, drawn, there), _share(near_drawn, there, drawn)),
        }
        somewhere = predicted + actual > 0
        return {name: column.where(somewhere, torch.nan).tolist() for name, column in found.items()}

    def metrics(self) -> dict[str, float]:
        """Return the yardsticks of all images.

        ``dice``, ``iou`` and ``boundary_f`` are means over the classes that are there, but the background; 1
        where there is none, since then nothing is wrong. ``b0_error`` and ``b1_error`` are means over images,
        ``b0_matching_error`` and ``b1_matching_error`` over those whose matching was taken, if there are any.
        """
        images, b0, b1, matched, m0, m1 = self.values[:_HEAD].tolist()
        found = {name: _mean(values[1:]) for name, values in self.by_class().items()}
        found |= {"b0_error": b0 / max(images, 1.0), "b1_error": b1 / max(images, 1.0)}
        if matched:
            found |= {"b0_matching_error": m0 / matched, "b1_matching_error": m1 / matched}
        return found

    def _classes(self) -> Tensor:
        return self.values[_HEAD:].reshape(-1, _COLUMNS).T


def _mean(values: list[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else 1.0


def _share(near: Tensor, of: Tensor, other: Tensor) -> Tensor:
    """Return near/of; where there is nothing, 1 if the other boundary has nothing either, and else 0."""
    return torch.where(of > 0, near / of.clamp(min=1), (other == 0).double())


def _harmonic(one: Tensor, other: Tensor) -> Tensor:
    """Return the harmonic mean of two shares; 0 where both are 0."""
    return 2 * one * other / (one + other).where(one + other > 0, 1)


def map_sums(
    predicted: Tensor,
    targets: Tensor,
    classes: int,
    *,
    tolerance: float = 2.0,
    connectivity: Connectivity = 8,
    matching: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> MapSums:
    """Return the sums of a batch; pixels that are ignored are of no class, in predictions and in masks.

    Dice is 2·TP/(2·TP + FP + FN) and IoU TP/(TP + FP + FN) of the pixels of all images. The boundary of a
    class are its pixels beside a pixel of another class that counts. Precision is the share of the predicted
    boundary that lies within ``tolerance`` of the actual one, recall that of the actual one near the
    predicted one, and boundary F is their harmonic mean. The Betti number error of an image is the mean over
    the classes but the background of the difference between predicted and actual number, the Betti matching
    error that of bars without a match, with a frame and 4-connected.

    Args:
        predicted: Classes in [0, K), int64, shape (B, H, W); anything where a pixel is ignored.
        targets: Classes or ``ignore_index``, int64, shape (B, H, W).
        classes: K, two at least.
        tolerance: In pixels.
        connectivity: Of the foreground, for the Betti numbers.
        matching: Whether to take the Betti matching, too: half a second for a noisy image of 256 by 256.
        ignore_index: Target of pixels that don't count.

    Raises:
        UserError: The shapes don't fit, or there are fewer than two classes.
    """
    if predicted.dim() != 3 or predicted.shape != targets.shape:
        raise UserError(
            f"predicted {tuple(predicted.shape)} and targets {tuple(targets.shape)} must be (B, H, W) both"
        )
    if classes < 2:
        raise UserError(f"classes={classes} must be 2 at least, the background among them")
    total = np.zeros(_HEAD + _COLUMNS * classes)
    if shapes_alone():
        return MapSums(torch.from_numpy(total))
    for answers, mask in zip(predicted.cpu().numpy(), targets.cpu().numpy(), strict=True):
        valid = mask != ignore_index
        if not valid.any():
            continue
        pairs = list(_masks(answers, mask, valid, classes))
        total[0] += 1
        total[1:3] += _topology(pairs, connectivity)
        if matching:
            total[3] += 1
            total[4:6] += np.mean([betti_matching_error(*pair) for pair in pairs[1:]], axis=0)
        total[_HEAD:] += [n for pair in pairs for n in _of_class(*pair, valid, tolerance)]
    return MapSums(torch.from_numpy(total))


def _masks(
    answers: NDArray[np.int64], mask: NDArray[np.int64], valid: Mask, classes: int
) -> Iterator[tuple[Mask, Mask]]:
    """Yield the predicted and the actual mask of each class, (H, W)."""
    for k in range(classes):
        yield (answers == k) & valid, mask == k


def _topology(pairs: list[tuple[Mask, Mask]], connectivity: Connectivity) -> NDArray[np.float64]:
    """Return the mean differences of both Betti numbers over the classes but the first, (2,)."""
    numbers = np.array(
        [[betti_numbers(one, connectivity=connectivity) for one in pair] for pair in pairs[1:]]
    )
    found: NDArray[np.float64] = np.abs(numbers[:, 0] - numbers[:, 1]).mean(0)
    return found


def _of_class(predicted: Mask, actual: Mask, valid: Mask, tolerance: float) -> list[int]:
    """Return the seven sums of a class and an image."""
    drawn, there = (_boundary(one, valid) for one in (predicted, actual))
    sums = [predicted & actual, predicted, actual]
    sums += [drawn, drawn & _near(there, tolerance), there, there & _near(drawn, tolerance)]
    return [int(one.sum()) for one in sums]


def _boundary(mask: Mask, valid: Mask) -> Mask:
    """Return the pixels of a mask beside one that counts and is none of it; beyond the edge none counts."""
    others = np.pad(valid & ~mask, 1)
    beside = others[:-2, 1:-1] | others[2:, 1:-1] | others[1:-1, :-2] | others[1:-1, 2:]
    found: Mask = mask & beside
    return found


def _near(pixels: Mask, tolerance: float) -> Mask:
    """Return which pixels lie within a distance of some pixels."""
    from scipy.ndimage import distance_transform_edt

    if not pixels.any():
        return np.zeros_like(pixels)
    found: Mask = distance_transform_edt(~pixels) <= tolerance
    return found
