"""Dice, generalised Dice and Tversky losses of masks, and Dice beside cross-entropy.

B images, K classes of which the first is the background, C that count; p = softmax(z), y the mask; sums go
over the pixels of an image that count.
"""

from typing import Any

from torch import Tensor

from lossworks.catalogue.declaration import Case, Paper, number, switch
from lossworks.entries.losses.classification.dice import FALSE_ALARMS, MISSES, dice, tversky
from lossworks.losses.maps import MapLoss, Maps

BACKGROUND = switch(
    True, "whether the background, the first class, counts as one of the classes", search=True
)


def smoothing_of_maps(default: float = 1e-5) -> Any:
    """Declare e, the smoothing of ratios."""
    return number(
        default,
        "e: smoothing; it decides what a class costs that an image hasn't, and no prediction is 0/0",
        gt=0,
        search=(1e-5, 1),
        log=True,
    )


def sizes(maps: Maps, *, background: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return overlap Σ p y, sizes Σ p and Σ y of each image and class that counts, shape (B, C) each."""
    first = 0 if background else 1
    p, y = (x[:, first:].flatten(2) for x in (maps.probabilities, maps.targets))
    return (p * y).sum(2), p.sum(2), y.sum(2)


def dice_of_maps(maps: Maps, smoothing: float, *, background: bool) -> Tensor:
    """Return the Dice loss of each image, 1 - mean_c (2 Σ p y + e)/(Σ p + Σ y + e), shape (B,)."""
    return dice(*sizes(maps, background=background), smoothing).mean(1)


class MapDice(MapLoss):
    """Dice loss of masks, the mean over the classes of each image.

    A class that neither mask nor prediction has costs nothing. The denominator has no squares, as in nnU-Net
    and in MONAI's ``DiceLoss``; the paper's has.
    """

    slug = "map-dice"
    formula = "1 - mean_c (2 Σ p y + e)/(Σ p + Σ y + e)"
    paper = Paper(
        "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation",
        "Milletari, Navab, Ahmadi",
        2016,
        "section 3",
    )

    smoothing: float = smoothing_of_maps()
    background: bool = BACKGROUND

    def images(self, maps: Maps) -> Tensor:
        """See :meth:`MapLoss.images`."""
        return dice_of_maps(maps, self.smoothing, background=self.background)


class GeneralisedDice(MapLoss):
    """Generalised Dice loss of masks: one ratio of all classes, each weighted by its inverse squared size.

    Small structures weigh as much as large ones. A class that an image hasn't weighs as much as the rarest
    that it has; a size below one pixel, which soft targets can have, counts as one pixel.
    """

    slug = "generalised-dice"
    formula = "1 - (2 Σ_c w Σ p y + e)/(Σ_c w (Σ p + Σ y) + e) with w = 1/(Σ y)²"
    paper = Paper(
        "Generalised Dice Overlap as a Deep Learning Loss Function for Highly Unbalanced Segmentations",
        "Sudre, Li, Vercauteren, Ourselin, Cardoso",
        2017,
        "section 2",
    )

    smoothing: float = smoothing_of_maps()
    background: bool = BACKGROUND

    def images(self, maps: Maps) -> Tensor:
        """See :meth:`MapLoss.images`."""
        overlap, predicted, actual = sizes(maps, background=self.background)
        there = actual > 0
        weight = actual.clamp(min=1).pow(-2) * there
        rarest = weight.amax(1, keepdim=True)
        # An image without any class that counts has the plain Dice.
        weight = weight.where(there, rarest.where(rarest > 0, 1))
        overlap, predicted, actual = ((weight * part).sum(1) for part in (overlap, predicted, actual))
        return dice(overlap, predicted, actual, self.smoothing)


class MapTversky(MapLoss):
    """Tversky loss of masks: Dice with a weight for false and one for missed pixels of a class."""

    slug = "map-tversky"
    formula = "1 - mean_c (TP + e)/(TP + α FP + β FN + e) with soft counts of each image"
    paper = Paper(
        "Tversky Loss Function for Image Segmentation Using 3D Fully Convolutional Deep Networks",
        "Salehi, Erdogmus, Gholipour",
        2017,
        "equation 4",
    )
    cases = (Case({"alpha": 0.5, "beta": 0.5, "smoothing": 0.5}, "map-dice", {"smoothing": 1.0}),)

    alpha: float = FALSE_ALARMS
    beta: float = MISSES
    smoothing: float = smoothing_of_maps()
    background: bool = BACKGROUND

    def images(self, maps: Maps) -> Tensor:
        """See :meth:`MapLoss.images`."""
        parts = sizes(maps, background=self.background)
        return tversky(*parts, self.alpha, self.beta, self.smoothing).mean(1)


class CEDice(MapLoss):
    """Cross-entropy of an image's pixels and Dice loss of its masks, in equal parts by default."""

    slug = "ce-dice"
    formula = "mean of -Σ_c y log p over the pixels + w (1 - mean_c (2 Σ p y + e)/(Σ p + Σ y + e))"
    paper = Paper(
        "nnU-Net: a Self-Configuring Method for Deep Learning-Based Biomedical Image Segmentation",
        "Isensee, Jaeger, Kohl, Petersen, Maier-Hein",
        2021,
        "methods; the form of TopoMortar, Valverde et al. 2025, but for a constant",
    )

    dice_weight: float = number(
        1.0, "w: weight of Dice beside cross-entropy", ge=0, search=(0.1, 10), log=True
    )
    smoothing: float = smoothing_of_maps()
    background: bool = BACKGROUND

    def images(self, maps: Maps) -> Tensor:
        """See :meth:`MapLoss.images`."""
        overlap = dice_of_maps(maps, self.smoothing, background=self.background)
        return maps.cross_entropy + self.dice_weight * overlap
