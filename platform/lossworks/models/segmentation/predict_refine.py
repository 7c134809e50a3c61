"""Predict and refine: a coarse map of classes, and a second network that adds a residual to it (BASNet).

Shapes: B images of C channels and sides H, W; D features of a pixel, the width; K classes.
"""

from typing import cast

import torch
from torch import Tensor, nn

from lossworks.models.interface import Head, Outputs
from lossworks.models.segmentation.segmenter import Segmenter, hanging_on
from lossworks.models.segmentation.unet import Pyramid
from lossworks.specs.tasks.segmenter import SegmenterSpec


class PredictRefine(Segmenter):
    """A U-Net with an output at every level, and a second, smaller one that refines the finest.

    The refined logits are those of the coarse map plus a residual that the second network reads off them
    (Qin et al., *Boundary-Aware Segmentation Network for Mobile and Web Applications*, 2021, section 3). In
    terms of features and head: a pixel's features are those of both networks side by side, (B, H, W, 2·D),
    and the head is both heads side by side. ``outputs.sides`` are the coarse map and those of every coarser
    level, the coarsest last, for losses such as ``basnet-hybrid`` that train each of them.

    Args:
        spec: What to build.
        channels: C.
        classes: K.
    """

    def __init__(self, spec: SegmenterSpec, channels: int, classes: int) -> None:
        super().__init__(spec)
        self.coarse = Pyramid(channels, spec.width, spec.levels, spec.groups)
        self.refiner = Pyramid(classes, spec.width, max(1, spec.levels - 1), spec.groups)
        self.side_heads = nn.ModuleList(nn.Linear(width, classes) for width in self.coarse.widths)
        self.residual = nn.Linear(spec.width, classes)

    def read(self, inputs: Tensor) -> Outputs:
        """See :meth:`Segmenter.read`."""
        levels = [features.movedim(1, -1) for features in self.coarse(inputs)]
        linear = [cast("nn.Linear", head) for head in self.side_heads]
        heads = [Head(own.weight, own.bias) for own in linear]
        sides = [Outputs(features, head) for features, head in zip(levels, heads, strict=True)]
        refined = self.refiner(sides[0].logits.movedim(-1, 1))[0].movedim(1, -1)
        return Outputs(torch.cat((refined, levels[0]), -1), self._joined(), sides=sides)

    def _joined(self) -> Head:
        """Return the head, which hangs on all side heads: a loss that reads no sides would leave some out."""
        head = self.head()
        coarser = hanging_on(self.side_heads[1:].parameters())
        return Head(head.weight, head.bias if head.bias is None else head.bias + coarser)

    def head(self) -> Head:
        """Return the heads of residual and coarse map side by side, (K, 2·D)."""
        coarse = cast("nn.Linear", self.side_heads[0])
        weight = torch.cat((self.residual.weight, coarse.weight), 1)
        return Head(weight, self.residual.bias + coarse.bias)

    def blocks(self) -> list[nn.Module]:
        """Return the convolution blocks of both networks."""
        return [*self.coarse.blocks(), *self.refiner.blocks()]
