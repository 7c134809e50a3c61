"""Focal loss of masks."""

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.losses.maps import MapLoss, Maps, pixel_means


class MapFocal(MapLoss):
    """Focal loss of an image's pixels: cross-entropy that quiets pixels which are surely right.

    It is the form of a softmax; with several classes MONAI's mean is also one over classes, a K-th of this.
    The gradient of (1-p)^γ is 0 at p = 1 where γ is below 1, too.
    """

    slug = "map-focal"
    formula = "mean of -Σ_c y (1-p)^γ log p over the pixels"
    paper = Paper(
        "Focal Loss for Dense Object Detection", "Lin, Goyal, Girshick, He, Dollár", 2017, "equation 4"
    )

    gamma: float = number(2.0, "γ: focus on pixels that are wrong; 0 is cross-entropy", ge=0, search=(0, 5))

    def images(self, maps: Maps) -> Tensor:
        """See :meth:`MapLoss.images`."""
        log_p = maps.log_probabilities
        # Away from 1, where a power below 1 has an infinite derivative.
        rest = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
        return pixel_means(-(maps.targets * rest**self.gamma * log_p).sum(1), maps.valid)
