"""A U-Net whose head grows: classes arrive in steps, and the background's logit is never overwritten (BARM).

Shapes: B images of C channels and sides H, W; D features of a pixel, the width; K_t classes of step t.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lossworks.errors import UserError
from lossworks.models.interface import Head, Outputs
from lossworks.models.segmentation.segmenter import Segmenter, hanging_on
from lossworks.models.segmentation.unet import Pyramid
from lossworks.specs.tasks.segmenter import SegmenterSpec


class Ear(nn.Module):
    """Features of one step's head: a convolution of 3 × 3, GroupNorm and a ReLU.

    Args:
        width: D.
        groups: Of GroupNorm.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (B, D, H, W) that the head reads, of those of all heads, x (B, D, H, W)."""
        return functional.relu(self.norm(self.convolution(x)))


_ABSENT = -30.0  # the logit of classes that have not arrived


@dataclass(frozen=True, eq=False)
class StepOutputs:
    """What the heads of all steps give.

    Attributes:
        ears: Features of each step's head, (B, D, H, W) each.
        heads: Logits of each: of step 0 the background b_0 and its classes, (B, H, W, 1 + K_0); of a later
            step t the background's residual δ_t and its classes, (B, H, W, 1 + K_t).
    """

    ears: list[Tensor]
    heads: list[Tensor]

    @classmethod
    def of(cls, outputs: Outputs) -> "StepOutputs":
        """Return what the sides of an :class:`IncrementalUNet`'s outputs are."""
        sides = outputs.sides
        return cls([side.hidden.movedim(-1, 1) for side in sides], [side.logits for side in sides])

    def background(self, clamped: int) -> Tensor:
        """Return b_0 + Σ_t min(δ_t, 0) over some later steps, and plain δ_t over the others, (B, H, W).

        Args:
            clamped: The last step whose residual may only lower it.
        """
        found = self.heads[0][..., 0]
        for step, head in enumerate(self.heads[1:], start=1):
            residual = head[..., 0]
            found = found + (residual.clamp(max=0) if step <= clamped else residual)
        return found

    def classes(self) -> Tensor:
        """Return the logits of all classes but the background, (B, H, W, ΣK_t)."""
        return torch.cat([head[..., 1:] for head in self.heads], -1)


class IncrementalUNet(Segmenter):
    """A U-Net with a head for each step of class-incremental training.

    Its logits are the background's, b_0 + Σ_t min(δ_t, 0), and those of all classes, each by a sigmoid of its
    own (Zhang and Gao, *Background Adaptation with Residual Modeling*, 2024). Heads of steps that have not
    begun are left out of the background, and their classes get a logit of −30.

    Args:
        spec: What to build; its ``steps`` are the K_t.
        channels: C.
        classes: K, the background and all K_t.

    Raises:
        UserError: The classes of the steps are not those of the data.
    """

    step: Tensor
    identity: Tensor

    def __init__(self, spec: SegmenterSpec, channels: int, classes: int) -> None:
        super().__init__(spec)
        if 1 + sum(spec.steps) != classes:
            raise UserError(
                f"model.steps={list(spec.steps)} adds {sum(spec.steps)} classes to the background; the data "
                f"have {classes - 1} besides it"
            )
        self.pyramid = Pyramid(channels, spec.width, spec.levels, spec.groups)
        self.ears = nn.ModuleList(Ear(spec.width, spec.groups) for _ in spec.steps)
        self.heads = nn.ModuleList(nn.Linear(spec.width, 1 + count) for count in spec.steps)
        self.register_buffer("step", torch.tensor(len(spec.steps) - 1))
        self.register_buffer("identity", torch.eye(classes), persistent=False)

    @property
    def linear(self) -> list[nn.Linear]:
        """The heads of all steps."""
        return [cast("nn.Linear", head) for head in self.heads]

    def read(self, inputs: Tensor) -> Outputs:
        """See :meth:`Segmenter.read`; the sides are features and head of each step that has begun."""
        features = self.pyramid(inputs)[0]
        begun = int(self.step) + 1
        ears = [ear(features).movedim(1, -1) for ear in self.ears[:begun]]
        heads = [Head(own.weight, own.bias) for own in self.linear]
        sides = [Outputs(ear, head) for ear, head in zip(ears, heads, strict=False)]
        found = StepOutputs(ears, [side.logits for side in sides])
        known = torch.cat((found.background(begun)[..., None], found.classes()), -1)
        logits = functional.pad(known, (0, len(self.identity) - known.shape[-1]), value=_ABSENT)
        if self.training and begun < len(self.ears):
            later = (*self.ears[begun:], *self.heads[begun:])
            logits = logits + hanging_on(p for module in later for p in module.parameters())
        return Outputs(logits, self.head(), dense=logits, sides=sides)

    def head(self) -> Head:
        """Return an identity: the features are the logits, since a minimum is in the background's."""
        return Head(self.identity)

    def blocks(self) -> list[nn.Module]:
        """Return the convolution blocks, and those of the heads."""
        return [*self.pyramid.blocks(), *self.ears]
