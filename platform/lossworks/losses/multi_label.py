"""Losses of sets of labels: N rows, L labels, at most P positives a row as a padded list of indices."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.head import linear_top_k
from lossworks.head.core.valid_rows import check_range
from lossworks.head.label_blocks import OverNegatives, streamed
from lossworks.losses.interface import Loss
from lossworks.losses.problems import CLASSES, Problem
from lossworks.losses.rows import wide
from lossworks.models.interface import Outputs

_POSITIVES = 3  # of a row of a problem


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

    Rows without positives count for nothing. Of scores ⟨f, g⟩ + b it takes (⟨f, g⟩ + b)/τ.
    """

    kind: ClassVar[str] = "multi-label"
    example: ClassVar[str] = "lossworks train jobs/specs/multi-label.yaml loss={slug}"
    invariances: ClassVar[tuple[str, ...]] = ("shift",)
    temperature: float
    normalise: bool

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`."""
        scores = torch.randn(rows, CLASSES, dtype=torch.float64, generator=generator)
        return Problem(scores, torch.randint(0, CLASSES, (rows, _POSITIVES), generator=generator))

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.of`; on embeddings where there is a head, else on scores (N, L)."""
        head = outputs.head
        if head is None:
            return super().of(outputs, batch, **how)
        return self.linear(outputs.hidden, head.weight, batch["targets"], head.bias, **self.given(batch))

    @torch.no_grad()
    def best(self, outputs: Outputs, k: int) -> Tensor:
        """Return the k labels with the highest scores, the highest first, (N, k), without all scores at once.

        Args:
            outputs: Of a model with features (N, D), or logits (N, L).
            k: At most the number of labels.
        """
        if outputs.head is None:
            return outputs.logits.topk(k, dim=1).indices
        e, c = self._normalised(outputs.hidden, outputs.head.weight)
        return linear_top_k(e, c.to(e), k, outputs.head.bias).classes

    def valid_rows(self, targets: Tensor) -> Tensor:
        """See :meth:`Loss.valid_rows`; of sets (N, P), shape (N,)."""
        return self.kept(targets != self.ignore_index)

    def row_losses(self, scores: Tensor, positives: Tensor, counted: Tensor) -> Tensor:
        """Return the losses of rows, shape (N,).

        Args:
            scores: s, divided by τ, shape (N, L).
            positives: Distinct; 0 where there is none, shape (N, P).
            counted: Where there is one, bool, shape (N, P).
        """
        raise NotImplementedError

    def kept(self, counted: Tensor) -> Tensor:
        """Return which rows count, bool, shape (N,), by which of their positives (N, P) there are."""
        return counted.any(-1)

    def count(self, targets: Tensor) -> Tensor:
        """Return how many rows of a summed loss count, by which a training loop divides."""
        return self.kept(targets != self.ignore_index).sum()

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
        own = self.checked(self.counting(positives, context), *scores.shape)
        counted = own != self.ignore_index
        kept = self.kept(counted)
        # Chosen first: where nothing counts, the scores may be anything.
        s = torch.where(kept[:, None], wide(scores) / self.temperature, 0)
        return self.reduce_elements(self.row_losses(s, own.masked_fill(~counted, 0), counted), kept, context)

    def scores(self, e: Tensor, c: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the scores of a linear head's labels, by which they are ranked; not divided by τ.

        Args:
            e: f of the rows, shape (N, D); half precision is read in float32.
            c: g of the labels, shape (L, D).
            bias: b, shape (L,), or None.

        Returns:
            ⟨f, g⟩ + b, of unit vectors if ``normalise`` says so, shape (N, L), float32 at least.

        Raises:
            UserError: The shapes don't fit.
        """
        self._require_head(e, c, bias)
        with torch.autocast(e.device.type, enabled=False):
            e, c = self._normalised(e, c)
            found = e @ c.to(e).T
            return found if bias is None else found + bias.to(e)

    def linear(
        self, e: Tensor, c: Tensor, positives: Tensor, bias: Tensor | None = None, **given: Any
    ) -> Tensor:
        """Return the loss of a linear head, from all its scores (N, L): this loss needs a row's at once.

        Args:
            e: f of the rows, shape (N, D); half precision is read in float32.
            c: g of the labels, shape (L, D).
            positives: As for :meth:`forward`.
            bias: b, shape (L,), or None.
            given: As for :meth:`forward`.

        Raises:
            UserError: Something doesn't fit together.
        """
        e, *_ = self._chosen(e, c, self.counting(positives, self.context(given)), bias)
        found: Tensor = self(self.scores(e, c, bias), positives, **given)
        return found

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

    def _chosen(
        self, e: Tensor, c: Tensor, positives: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return e (0 in rows that don't count), distinct positives, which there are, and which rows count.

        Where nothing counts, the embeddings may be anything.
        """
        self._require_head(e, c, bias)
        own = self.checked(positives, len(e), len(c))
        counted = own != self.ignore_index
        kept = self.kept(counted)
        return torch.where(kept[:, None], e, 0), own, counted, kept

    def _require_head(self, e: Tensor, c: Tensor, bias: Tensor | None) -> None:
        if e.dim() != 2 or c.dim() != 2 or e.shape[1] != c.shape[1]:
            raise UserError(
                f"{self.slug}: e {tuple(e.shape)} and c {tuple(c.shape)} must be (N, D) and (L, D)"
            )
        if bias is not None and bias.shape != c.shape[:1]:
            raise UserError(f"{self.slug}: bias {tuple(bias.shape)} must be ({len(c)},)")

    def _normalised(self, e: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return e in float32 at least, and both of unit length where that is asked for."""
        e = wide(e)
        return (F.normalize(e, dim=1), F.normalize(wide(c), dim=1)) if self.normalise else (e, c)


class StreamedMultiLabelLoss(MultiLabelLoss):
    """A loss of each positive's score and one number of the negatives, which needs no scores of all labels.

    A subclass says which number in ``over_negatives`` and implements :meth:`of_positives`.
    """

    without_logits = True
    products = 4.0
    over_negatives: ClassVar[OverNegatives]

    def of_positives(self, negatives: Tensor, own: Tensor, counted: Tensor) -> Tensor:
        """Return the losses of rows, shape (N,).

        Args:
            negatives: The number of the row's negatives, shape (N,).
            own: Scores of its positives, shape (N, P).
            counted: Which of them there are, bool, shape (N, P).
        """
        raise NotImplementedError

    def row_losses(self, scores: Tensor, positives: Tensor, counted: Tensor) -> Tensor:
        """See :meth:`MultiLabelLoss.row_losses`."""
        mask = positive_mask(positives.masked_fill(~counted, -1), scores.shape[1], -1)
        some = ~mask.all(1)
        # A logsumexp of nothing but -∞ has no gradient.
        negatives = self.over_negatives.of(scores.masked_fill(mask & some[:, None], -torch.inf))
        negatives = negatives.masked_fill(~some, self.over_negatives.of_none)
        return self.of_positives(negatives, scores.gather(1, positives), counted)

    def linear(
        self,
        e: Tensor,
        c: Tensor,
        positives: Tensor,
        bias: Tensor | None = None,
        *,
        block: int = 4096,
        **given: Tensor | None,
    ) -> Tensor:
        """Return the loss of a linear head; memory grows with N·``block`` and not with N·L.

        Args:
            e: f of the rows, shape (N, D); half precision is read in float32.
            c: g of the labels, shape (L, D).
            positives: As for :meth:`forward`.
            bias: b, shape (L,), or None.
            block: Labels whose scores are held at once.
            given: As for :meth:`forward`.

        Raises:
            UserError: Something doesn't fit together.
        """
        context = self.context(given)
        if block < 1:
            raise UserError(f"{self.slug}: block={block} must be at least 1")
        e, own, counted, kept = self._chosen(e, c, self.counting(positives, context), bias)
        with torch.autocast(e.device.type, enabled=False):
            e, c = self._normalised(e, c)
            offset = None if bias is None else bias / self.temperature
            operands = e / self.temperature, c, offset
            found = streamed(*operands, own, counted, self.over_negatives, block)
        return self.reduce_elements(self.of_positives(*found, counted), kept, context)
