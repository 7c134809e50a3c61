"""Decoupled softmax: positives that don't compete with one another, on scores or on embeddings.

Shapes: N rows, L labels, D dimensions, P positives a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lossworks.catalogue.declaration import Paper, number, switch
from lossworks.errors import UserError
from lossworks.losses.multi_label import MultiLabelLoss, mean_of_counted, positive_mask
from lossworks.losses.rows import wide


def decoupled(negatives: Tensor, own: Tensor, counted: Tensor) -> Tensor:
    """Return (1/|P|) Σ_j∈P softplus(n - s_j), shape (N,).

    Args:
        negatives: n, the logsumexp of the row's scores but its positives'; -∞ without any, shape (N,).
        own: s_j of the positives, shape (N, P).
        counted: Which of them there are, bool, shape (N, P).
    """
    return mean_of_counted(F.softplus(negatives[:, None] - own), counted)


class _Streamed(torch.autograd.Function):
    """n and the positives' scores of e·cᵀ, by blocks of labels, which the backward pass makes once more.

    Positives are masked inside a block: to take them off the whole logsumexp afterwards would cancel where
    they dominate it.
    """

    @staticmethod
    def forward(
        ctx: Any, e: Tensor, c: Tensor, positives: Tensor, counted: Tensor, block: int
    ) -> tuple[Tensor, Tensor]:
        negatives = e.new_full((len(e),), -torch.inf)
        own = e.new_zeros(positives.shape)
        for part in _blocks(len(c), block):
            scores, (rows, slots, columns) = _block_scores(e, c, part, positives, counted)
            own[rows, slots] = scores[rows, columns]
            scores[rows, columns] = -torch.inf
            negatives = torch.logaddexp(negatives, scores.logsumexp(1))
        ctx.save_for_backward(e, c, positives, counted, negatives)
        ctx.block = block
        return negatives, own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_n: Tensor, of_own: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        e, c, positives, counted, negatives = ctx.saved_tensors
        # Without negatives every score is masked, and exp(-∞ - 0) is the 0 that it should be.
        finite = torch.where(negatives.isinf(), 0, negatives)[:, None]
        of_e, of_c = torch.zeros_like(e), torch.empty_like(c)
        for part in _blocks(len(c), ctx.block):
            scores, (rows, slots, columns) = _block_scores(e, c, part, positives, counted)
            scores[rows, columns] = -torch.inf
            slopes = scores.sub_(finite).exp_().mul_(of_n[:, None])
            slopes[rows, columns] = of_own[rows, slots]
            of_e.addmm_(slopes, c[part].to(e))
            of_c[part] = (slopes.T @ e).to(c)
        return of_e, of_c, None, None, None


def _blocks(labels: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, labels)) for start in range(0, labels, block)]


def _block_scores(
    e: Tensor, c: Tensor, part: slice, positives: Tensor, counted: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return scores (N, B), and the rows, slots and columns of the positives among these labels."""
    inside = counted & (positives >= part.start) & (positives < part.stop)
    rows, slots = inside.nonzero(as_tuple=True)
    return e @ c[part].to(e).T, (rows, slots, positives[rows, slots] - part.start)


class DecoupledSoftmax(MultiLabelLoss):
    """Decoupled softmax: each positive against the negatives alone.

    Cross-entropy averaged over positives draws each to p = 1/|P| and so pushes the easy ones down; here no
    positive is ever pushed down. With one positive a row it is cross-entropy. ``linear`` takes embeddings and
    never holds the scores of all labels.
    """

    slug = "decoupled-softmax"
    formula = "1/|P| Σ_j∈P softplus(n - s_j) with n = lse over k∉P of s_k, s = ⟨f, g⟩/τ"
    paper = Paper(
        "Dual-Encoders for Extreme Multi-Label Classification",
        "Gupta, Devvrit, Rawat, Bhojanapalli, Jain, Dhillon",
        2024,
        "section 4.2",
    )

    temperature: float = number(0.05, "τ, which scores are divided by", gt=0, search=(0.01, 1), log=True)
    normalise: bool = switch(True, "embeddings are brought to unit length; scores are taken as they are")

    def row_losses(self, scores: Tensor, positives: Tensor, counted: Tensor) -> Tensor:
        """See :meth:`MultiLabelLoss.row_losses`."""
        mask = positive_mask(positives.masked_fill(~counted, -1), scores.shape[1], -1)
        some = ~mask.all(1)
        # A logsumexp of nothing but -∞ has no gradient.
        negatives = scores.masked_fill(mask & some[:, None], -torch.inf).logsumexp(1)
        return decoupled(negatives.masked_fill(~some, -torch.inf), scores.gather(1, positives), counted)

    def linear(
        self, e: Tensor, c: Tensor, positives: Tensor, *, block: int = 4096, **given: Tensor | None
    ) -> Tensor:
        """Return the loss of embeddings; memory grows with N·``block`` and not with N·L.

        Args:
            e: f of the rows, shape (N, D); half precision is read in float32.
            c: g of the labels, shape (L, D).
            positives: As for :meth:`forward`.
            block: Labels whose scores are held at once.
            given: As for :meth:`forward`.

        Raises:
            UserError: Something doesn't fit together.
        """
        context = self.context(given)
        if e.dim() != 2 or c.dim() != 2 or e.shape[1] != c.shape[1] or block < 1:
            raise UserError(
                f"{self.slug}: e {tuple(e.shape)} and c {tuple(c.shape)} must be (N, D) and (L, D), and "
                f"block={block} at least 1"
            )
        own = self.checked(positives, len(e), len(c))
        counted = own != self.ignore_index
        kept = counted.any(1)
        e = torch.where(kept[:, None], wide(e), 0)
        if self.normalise:
            e, c = F.normalize(e, dim=1), F.normalize(wide(c), dim=1)
        with torch.autocast(e.device.type, enabled=False):
            negatives, scores = _Streamed.apply(e / self.temperature, c, own, counted, block)
        return self.reduce_elements(decoupled(negatives, scores, counted), kept, context)
