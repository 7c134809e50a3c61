"""Losses of whole maps: what a segmenter says of an image, against its mask.

Shapes: B images, K classes of which the first is the background, H by W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from lossworks.adapters.torch_private import shapes_alone, without_values
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.head.core.valid_rows import check_range
from lossworks.losses.interface import Loss
from lossworks.losses.problems import Problem, of_maps
from lossworks.losses.rows import wide
from lossworks.models.interface import Outputs

_SOFT = "soft_targets"


@dataclass(frozen=True, eq=False)
class Maps:
    """Predictions and masks of images, 0 in pixels that don't count.

    Attributes:
        logits: z, float32 at least, shape (B, K, H, W).
        targets: y, one-hot classes or their probabilities, in the same dtype, shape (B, K, H, W).
        valid: Which pixels count, bool, shape (B, H, W).
        further: What the batch holds besides, by name.
    """

    logits: Tensor
    targets: Tensor
    valid: Tensor
    further: Mapping[str, Tensor | None] = field(default_factory=dict)

    @cached_property
    def log_probabilities(self) -> Tensor:
        """Logarithms of p, in pixels that don't count those of equal logits, shape (B, K, H, W)."""
        return self.logits.log_softmax(1)

    @cached_property
    def probabilities(self) -> Tensor:
        """Probabilities p of the classes, 0 in pixels that don't count, shape (B, K, H, W)."""
        return torch.where(self.valid[:, None], self.log_probabilities.exp(), 0)

    @cached_property
    def cross_entropy(self) -> Tensor:
        """Mean cross-entropy of the pixels that count, in nats, shape (B,)."""
        return pixel_means(-(self.targets * self.log_probabilities).sum(1), self.valid)


def seen(values: Tensor) -> NDArray[Any] | None:
    """Return the numbers of a tensor on the CPU, without a gradient; None where only shapes are known.

    Raises:
        UserError: torch compiles: what is found on the CPU would be no part of what it makes.
    """
    if torch.compiler.is_compiling():
        raise UserError("this loss looks at values on the CPU: compile the model without it")
    if shapes_alone() or without_values(values):
        return None
    found: NDArray[Any] = values.detach().cpu().numpy()
    return found


def pixel_means(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean (B,) of values (B, H, W) over pixels that count, bool (B, H, W); 0 where none does."""
    return torch.where(valid, values, 0).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


class MapLoss(Loss):
    """A loss of each image from its whole map; a pixel that is ignored counts for nothing.

    An image of which no pixel counts has the loss 0 and is not counted. Soft targets (B, K, H, W), where they
    are given, take the place of the one-hot targets of the pixels that count. A subclass implements
    :meth:`images`.
    """

    kind: ClassVar[str] = "map"
    example: ClassVar[str] = "lossworks train jobs/specs/walls.yaml loss={slug}"
    invariances: ClassVar[tuple[str, ...]] = ("shift",)

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`; maps of three classes."""
        return of_maps(rows, generator)

    def prediction(self, outputs: Outputs) -> Tensor:
        """See :meth:`Loss.prediction`; the logits as maps, (B, K, H, W)."""
        return outputs.logits.movedim(-1, 1)

    def given(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`Loss.given`; with soft targets, where the batch holds them."""
        return {**super().given(batch), **{name: batch[name] for name in (_SOFT,) if name in batch}}

    def count(self, targets: Tensor) -> Tensor:
        """See :meth:`Loss.count`; of images that have a pixel which counts."""
        return self._images_that_count(self.valid_rows(targets)).sum()

    def images(self, maps: Maps) -> Tensor:
        """Return the loss of each image, shape (B,); what it is where no pixel counts does not matter."""
        raise NotImplementedError

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of maps.

        Args:
            logits: z, shape (B, K, H, W), two classes or more; half precision is read in float32.
            targets: Classes in [0, K) or ``ignore_index``, int64, shape (B, H, W).
            given: ``weight`` of each image, shape (B,); ``soft_targets``, shape (B, K, H, W).

        Returns:
            A scalar, or (B,) for ``reduction="none"``; float32 at least.

        Raises:
            UserError: The shapes or dtypes don't fit, or a target is out of range.
        """
        context = self.context(given)
        self._check(logits, targets)
        targets = self.counting(targets, context)
        with torch.autocast(logits.device.type, enabled=False):
            maps = self._maps(logits, targets, context.others)
            values = self.images(maps)
            return self.reduce_elements(values, self._images_that_count(maps.valid), context)

    def _check(self, logits: Tensor, targets: Tensor) -> None:
        if logits.dim() != 4 or logits.shape[1] < 2:
            raise UserError(
                f"{self.slug}: logits {tuple(logits.shape)} must be (B, K, H, W) of two classes or more"
            )
        if targets.dtype != torch.int64:
            raise UserError(f"{self.slug}: targets are {targets.dtype}; they must be torch.int64")
        self.require_shape("targets", targets, logits[:, 0])
        check_range(targets.reshape(-1), classes=logits.shape[1], ignore_index=self.ignore_index)

    def _maps(self, logits: Tensor, targets: Tensor, further: Mapping[str, Tensor | None]) -> Maps:
        """Return what counts; chosen, and not multiplied, since what doesn't count may hold anything."""
        valid = self.valid_rows(targets)
        z = torch.where(valid[:, None], wide(logits), 0)
        soft = further.get(_SOFT)
        if soft is None:
            every = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
            return Maps(z, ((targets[:, None] == every) & valid[:, None]).to(z), valid, further)
        self.require_shape(_SOFT, soft, logits)
        return Maps(z, torch.where(valid[:, None], soft.detach().to(z), 0), valid, further)

    def _images_that_count(self, valid: Tensor) -> Tensor:
        return valid.flatten(1).any(1)
