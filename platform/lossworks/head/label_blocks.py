"""Scores of many labels, a block of labels at a time: memory grows with N·block and not with N·L.

Shapes: N rows, L labels, D dimensions, P positives a row, B labels a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class OverNegatives:
    """A number of each row's negatives that can be put together from parts of them.

    Attributes:
        of: Takes scores, shape (N, B), -∞ where a label is positive, and returns the number, shape (N,).
        together: Takes the numbers of two parts, shape (N,) each, and returns that of both.
        slopes: Takes such scores and the whole row's number, and returns its derivative by the scores.
        of_none: The number where a row has no negative.
    """

    of: Callable[[Tensor], Tensor]
    together: Callable[[Tensor, Tensor], Tensor]
    slopes: Callable[[Tensor, Tensor], Tensor]
    of_none: float


def _shares(scores: Tensor, total: Tensor) -> Tensor:
    # Without negatives every score is masked, and exp(-∞ - 0) is the 0 that it should be.
    return (scores - torch.where(total.isinf(), 0, total)[:, None]).exp_()


LOG_SUM_EXP = OverNegatives(lambda scores: scores.logsumexp(1), torch.logaddexp, _shares, -torch.inf)
SOFTPLUS_SUM = OverNegatives(
    lambda scores: F.softplus(scores).sum(1), torch.add, lambda scores, _: scores.sigmoid(), 0.0
)


def streamed(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    positives: Tensor,
    counted: Tensor,
    over_negatives: OverNegatives,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Return a number of each row's negatives, shape (N,), and the positives' scores of e·cᵀ + b, (N, P).

    The backward pass makes the scores once more. Positives are masked inside a block: to take them off the
    whole number afterwards would cancel where they dominate it.

    Args:
        e: f of the rows, float32 at least, shape (N, D).
        c: g of the labels, shape (L, D); read in the dtype of ``e``.
        bias: b, shape (L,), or None.
        positives: Distinct labels in [0, L), int64, shape (N, P).
        counted: Which of them there are, bool, shape (N, P).
        over_negatives: Which number.
        block: B, labels whose scores are held at once.
    """
    negatives, own = _Streamed.apply(e, c, bias, positives, counted, over_negatives, block)
    return negatives, own


class _Streamed(torch.autograd.Function):
    """See :func:`streamed`."""

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        positives: Tensor,
        counted: Tensor,
        over_negatives: OverNegatives,
        block: int,
    ) -> tuple[Tensor, Tensor]:
        negatives = e.new_full((len(e),), over_negatives.of_none)
        own = e.new_zeros(positives.shape)
        for part in _blocks(len(c), block):
            scores, (rows, slots, columns) = _block_scores(e, c, bias, part, positives, counted)
            own[rows, slots] = scores[rows, columns]
            scores[rows, columns] = -torch.inf
            negatives = over_negatives.together(negatives, over_negatives.of(scores))
        ctx.save_for_backward(e, c, bias, positives, counted, negatives)
        ctx.over_negatives, ctx.block = over_negatives, block
        return negatives, own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_negatives: Tensor, of_own: Tensor) -> tuple[Tensor | None, ...]:
        e, c, bias, positives, counted, negatives = ctx.saved_tensors
        of_e, of_c = torch.zeros_like(e), torch.empty_like(c)
        of_bias = None if bias is None else torch.empty_like(bias)
        for part in _blocks(len(c), ctx.block):
            scores, (rows, slots, columns) = _block_scores(e, c, bias, part, positives, counted)
            scores[rows, columns] = -torch.inf
            slopes = ctx.over_negatives.slopes(scores, negatives).mul_(of_negatives[:, None])
            slopes[rows, columns] = of_own[rows, slots]
            of_e.addmm_(slopes, c[part].to(e))
            of_c[part] = (slopes.T @ e).to(c)
            if of_bias is not None:
                of_bias[part] = slopes.sum(0).to(of_bias)
        return of_e, of_c, of_bias, None, None, None, None


def _blocks(labels: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, labels)) for start in range(0, labels, block)]


def _block_scores(
    e: Tensor, c: Tensor, bias: Tensor | None, part: slice, positives: Tensor, counted: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return scores (N, B), and the rows, slots and columns of the positives among these labels."""
    inside = counted & (positives >= part.start) & (positives < part.stop)
    rows, slots = inside.nonzero(as_tuple=True)
    scores = e @ c[part].to(e).T
    if bias is not None:
        scores += bias[part].to(e)
    return scores, (rows, slots, positives[rows, slots] - part.start)
