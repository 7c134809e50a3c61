"""Losses of sets of labels: N rows, L labels, at most P positives a row as a padded list of indices."""

from typing import ClassVar

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Kind
from lossworks.errors import UserError
from lossworks.head.core.valid_rows import check_range
from lossworks.losses.interface import Loss
from lossworks.losses.rows import wide


def distinct(positives: Tensor, ignore_index: int) -> Tensor:
    """Return the rows sorted, (N, P), with ``ignore_index`` where an index had come before."""
    ordered = positives.sort(1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(repeated, ignore_index)


def positive_mask(positives: Tensor, labels: int, ignore_index: int) -> Tensor:
    """Return which labels are positive, bool, shape (N, L)."""
    # One more column takes the padding.
    index = torch.where(positives == ignore_index, labels, positives)
    mask = positives.new_zeros(len(positives), labels + 1, dtype=torch.bool)
    return mask.scatter_(1, index, torch.ones_like(index, dtype=torch.bool))[:, :labels]


def mean_of_counted(values: Tensor, counted: Tensor) -> Tensor:
    """Return means over the last axis of what counts, (N, P) to (N,); 0 where nothing does."""
    return torch.where(counted, values, 0).sum(-1) / counted.sum(-1).clamp(min=1)


class MultiLabelLoss(Loss):
    """A loss of scores against each row's set of positives; a label that is given twice counts once.

    Rows without positives count for nothing. Of scores ⟨f, g⟩ it takes ⟨f, g⟩/τ.
    """

    kind: ClassVar[Kind] = "multi-label"
    invariances = ("shift",)
    temperature: float

    def row_losses(self, scores: Tensor, positives: Tensor, counted: Tensor) -> Tensor:
        """Return the losses of rows, shape (N,).

        Args:
            scores: s = ⟨f, g⟩/τ, shape (N, L).
            positives: Distinct; 0 where there is none, shape (N, P).
            counted: Where there is one, bool, shape (N, P).
        """
        raise NotImplementedError

    def count(self, targets: Tensor) -> Tensor:
        """Return how many rows of a summed loss count, by which a training loop divides."""
        return (targets != self.ignore_index).any(-1).sum()

    def forward(self, scores: Tensor, positives: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of dense scores.

        Args:
            scores: Shape (N, L), floating point; half precision is read in float32.
            positives: Labels in [0, L), int64, shape (N, P), padded with ``ignore_index``.
            given: Fields of :class:`lossworks.losses.Context`; ``weight`` has the shape (N,).

        Returns:
            A scalar, or (N,) for ``reduction="none"``; float32 at least.
        """
        context = self.context(given)
        if scores.dim() != 2:
            raise UserError(f"{self.slug}: scores {tuple(scores.shape)} must be (N, L)")
        own = self.checked(positives, *scores.shape)
        counted = own != self.ignore_index
        kept = counted.any(1)
        # Chosen first: where nothing counts, the scores may be anything.
        s = torch.where(kept[:, None], wide(scores) / self.temperature, 0)
        return self.reduce_elements(self.row_losses(s, own.masked_fill(~counted, 0), counted), kept, context)

    def checked(self, positives: Tensor, rows: int, labels: int) -> Tensor:
        """Return distinct positives.

        Raises:
            UserError: They have another shape or dtype, or are out of range.
        """
        if positives.dim() != 2 or len(positives) != rows or positives.dtype != torch.int64:
            raise UserError(
                f"{self.slug}: positives {tuple(positives.shape)} of {positives.dtype} must be ({rows}, P) "
                "of torch.int64"
            )
        check_range(positives.reshape(-1), classes=labels, ignore_index=self.ignore_index)
        return distinct(positives, self.ignore_index)
