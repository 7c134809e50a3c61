"""What models of dense prediction have in common: features of every pixel, of images of any size.

Shapes: B images of C channels and sides H, W; D features of a pixel; K classes.
"""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from lossworks.models.interface import HeadedModel, Outputs
from lossworks.models.segmentation.windows import blended
from lossworks.specs.tasks.segmenter import SegmenterSpec


def hanging_on(parameters: Iterable[Tensor]) -> Tensor:
    """Return 0, which hangs on parameters that nothing else reads: DDP waits for a gradient of every one."""
    return torch.stack([0.0 * parameter.sum() for parameter in parameters]).sum()


class Segmenter(HeadedModel):
    """A model that gives features (B, H, W, D) of images (B, C, H, W), and a head for each pixel.

    After ``eval()`` images with a side above ``spec.window`` are read by overlapping windows, which bounds
    the memory; in training they are read whole. No layer looks at other images of a batch (GroupNorm instead
    of BatchNorm), so that micro-batches, ranks and federated clients compute the same function.

    Args:
        spec: What was built.
    """

    def __init__(self, spec: SegmenterSpec) -> None:
        super().__init__()
        self.window = spec.window

    @abstractmethod
    def read(self, inputs: Tensor) -> Outputs:
        """Return features, head and sides of whole images (B, C, H, W)."""

    def outputs(self, inputs: Tensor) -> Outputs:
        """See :meth:`HeadedModel.outputs`; images that are read by windows have no sides."""
        if self.by_windows(inputs):
            return Outputs(self.hidden(inputs), self.head(), rerun=self.outputs)
        found = self.read(inputs)
        return Outputs(found.hidden, found.head, rerun=self.outputs, sides=found.sides)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the features (B, H, W, D) of images (B, C, H, W)."""
        if self.by_windows(inputs):
            return blended(lambda part: self.read(part).hidden, inputs, self.window)
        return self.read(inputs).hidden

    def by_windows(self, inputs: Tensor) -> bool:
        """Return whether images (B, C, H, W) are too large to be read whole now."""
        return not self.training and 0 < self.window < max(inputs.shape[2:])

    @torch.no_grad()
    def classes_of(self, inputs: Tensor) -> Tensor:
        """Return the class of each pixel, (B, H, W) int64, of images (B, C, H, W), and keep no more.

        The logits of large images are taken a window at a time, so that there are never features of more
        than one.
        """
        if not self.by_windows(inputs):
            return self.logits(inputs).argmax(-1)
        return blended(lambda part: self.head().logits(self.read(part).hidden), inputs, self.window).argmax(
            -1
        )

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of the convolution blocks, and compute the rest again."""
        for block in self.blocks():
            block.recomputed = True  # type: ignore[assignment]
