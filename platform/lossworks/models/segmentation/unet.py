"""A small U-Net with GroupNorm, of any number of levels (Ronneberger, Fischer, Brox 2015).

Shapes: B images of C channels and sides H, W; D features of a pixel, the width; K classes.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lossworks.models.interface import Head, Outputs
from lossworks.models.segmentation.segmenter import Segmenter
from lossworks.specs.tasks.segmenter import SegmenterSpec


class ConvBlock(nn.Module):
    """Two convolutions of 3 × 3, each with GroupNorm and a ReLU.

    Args:
        into: Channels that come in.
        out: Channels that go out.
        groups: Of GroupNorm; must divide ``out``.
    """

    def __init__(self, into: int, out: int, groups: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, out, 3, padding=1, bias=False) for channels in (into, out)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups, out) for _ in range(2))
        self.recomputed = False

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, out, h, w) of a map x (B, into, h, w)."""
        if self.recomputed and self.training:
            found: Tensor = checkpoint(self._layers, x, use_reentrant=False)
            return found
        return self._layers(x)

    def _layers(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = functional.relu(norm(convolution(x)))
        return x


class Pyramid(nn.Module):
    """Encoder and decoder of a U-Net: features of a map, and those of each coarser level on the way up.

    The sides may be any number of pixels: each level halves them, rounding up, and the way back takes the
    sides of the level that it joins.

    Args:
        into: Channels that come in.
        width: Channels of the finest level, D; each coarser level has twice as many.
        levels: How many levels there are below the finest.
        groups: Of GroupNorm.
    """

    def __init__(self, into: int, width: int, levels: int, groups: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList(
            ConvBlock(before, after, groups) for before, after in zip((into, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(ConvBlock(coarse + fine, fine, groups) for fine, coarse in pairwise(widths))
        self.widths = widths

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return features of all levels, the finest (B, D, H, W) first, of inputs (B, into, H, W)."""
        # Channels last: convolutions on CPUs take two thirds of the time, and the head reads pixels as rows.
        x = x.contiguous(memory_format=torch.channels_last)
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else functional.max_pool2d(x, 2, ceil_mode=True))
            kept.append(x)
        found = [kept[-1]]
        for block, fine in zip(reversed(self.up), reversed(kept[:-1]), strict=True):
            coarse = functional.interpolate(found[0], size=fine.shape[2:], mode="nearest")
            found.insert(0, block(torch.cat((coarse, fine), 1)))
        return found

    def blocks(self) -> Sequence[nn.Module]:
        """Return the convolution blocks, those of the encoder first."""
        return [*self.down, *self.up]


class UNet(Segmenter):
    """A U-Net whose finest features a linear head of 1 × 1 turns into logits.

    Args:
        spec: What to build.
        channels: C.
        classes: K.
    """

    def __init__(self, spec: SegmenterSpec, channels: int, classes: int) -> None:
        super().__init__(spec)
        self.pyramid = Pyramid(channels, spec.width, spec.levels, spec.groups)
        self.classifier = nn.Linear(spec.width, classes)

    def read(self, inputs: Tensor) -> Outputs:
        """See :meth:`Segmenter.read`."""
        return Outputs(self.pyramid(inputs)[0].movedim(1, -1), self.head())

    def head(self) -> Head:
        """Return the head with its bias."""
        return Head(self.classifier.weight, self.classifier.bias)

    def blocks(self) -> list[nn.Module]:
        """Return the convolution blocks."""
        return list(self.pyramid.blocks())
