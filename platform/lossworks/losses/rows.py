"""Rows of logits as losses see them: statistics, whether the logits were built or not.

Shapes: N rows in any number of leading axes, K classes.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lossworks.data.batch import IGNORE_INDEX
from lossworks.errors import UserError
from lossworks.head import (
    LogSumExp,
    LowRankClassifier,
    Target,
    VocabParallel,
    linear_row_statistics,
    row_statistics,
)
from lossworks.head.core.arguments import Implementation
from lossworks.head.core.valid_rows import blanked
from lossworks.head.statistics import Statistic, StatisticName
from lossworks.models.interface import Outputs


def wide(values: Tensor) -> Tensor:
    """Return half precision in float32, and what is wider as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class LogitRows(Protocol):
    """What a row loss is a function of.

    Attributes:
        targets: Classes in [0, K) or ``ignore_index``, int64, shape (...).
        valid: Which rows count, bool, shape (...).
        classes: K, over all ranks.
    """

    targets: Tensor
    valid: Tensor
    classes: int

    def __call__(
        self, *statistics: Statistic | StatisticName, offset: Tensor | float = 0.0
    ) -> tuple[Tensor, ...]:
        """Return statistics shaped like the targets, 0 in rows that don't count.

        Args:
            statistics: Which; per-row temperatures have the shape (N,) of the flat rows.
            offset: Added to the targets' logits before anything else is taken; one number or (N,).
        """


class DenseRows:
    """Rows of logits that are there.

    Args:
        logits: z, shape (..., K), float32 or float64.
        targets: Shape (...), int64.
        ignore_index: Target of rows that don't count.

    Raises:
        UserError: The shapes or dtypes don't fit, or a target is out of range.
    """

    def __init__(self, logits: Tensor, targets: Tensor, ignore_index: int) -> None:
        if targets.dtype != torch.int64:
            raise UserError(f"targets are {targets.dtype}; they must be torch.int64 class indices")
        if logits.dim() != targets.dim() + 1 or logits.shape[:-1] != targets.shape:
            raise UserError(
                f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must be (..., K) and (...)"
            )
        self.targets, self.valid = targets, targets != ignore_index
        self.classes = logits.shape[-1]
        self._logits = logits.reshape(targets.numel(), self.classes)
        self._ignore_index = ignore_index

    def __call__(
        self, *statistics: Statistic | StatisticName, offset: Tensor | float = 0.0
    ) -> tuple[Tensor, ...]:
        """See :class:`LogitRows`."""
        flat = self.targets.reshape(-1)
        offsets = _offsets(offset, self._logits[:, 0])
        found = row_statistics(
            self._logits, flat, statistics, ignore_index=self._ignore_index, target_offset=offsets
        )
        return tuple(value.reshape(*self.targets.shape, *value.shape[1:]) for value in found)


class LinearRows:
    """Rows of E·Cᵀ + b, which are never built; arguments as for :func:`lossworks.linear_row_statistics`."""

    def __init__(
        self,
        e: Tensor,
        c: Tensor | LowRankClassifier,
        targets: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        *,
        softcap: float | None = None,
        impl: Implementation = "auto",
        vocab_parallel: VocabParallel | dist.ProcessGroup | None = None,
        classes: int | None = None,
    ) -> None:
        self.targets, self.valid = targets, targets != ignore_index
        self.classes = len(c) if classes is None else classes
        self._operands = e, c, targets, bias
        self._ignore_index, self._softcap = ignore_index, softcap
        self._impl: Implementation = impl
        self._vocab_parallel = vocab_parallel

    def __call__(
        self, *statistics: Statistic | StatisticName, offset: Tensor | float = 0.0
    ) -> tuple[Tensor, ...]:
        """See :class:`LogitRows`."""
        e, c, targets, bias = self._operands
        like = targets.new_empty(targets.shape, dtype=torch.promote_types(e.dtype, torch.float32))
        offsets = _offsets(offset, like)
        return linear_row_statistics(
            *(e, c, targets, bias),
            statistics=statistics,
            ignore_index=self._ignore_index,
            softcap=self._softcap,
            target_offset=offsets,
            impl=self._impl,
            vocab_parallel=self._vocab_parallel,
        )


def rows_of(
    outputs: Outputs, targets: Tensor, *, ignore_index: int = IGNORE_INDEX, impl: Implementation = "auto"
) -> LogitRows:
    """Return the rows of logits of a model's outputs, which are not built where there is a head.

    Args:
        outputs: Features (..., D) with a head, or logits (..., K).
        targets: Shape (...), int64.
        ignore_index: Target of rows that don't count; they may hold anything.
        impl: As for :func:`lossworks.linear_cross_entropy`.
    """
    head = outputs.head
    if head is None:
        logits = blanked(wide(outputs.logits), targets == ignore_index)
        return DenseRows(logits, targets, ignore_index)
    return LinearRows(
        *(outputs.hidden, head.weight, targets, head.bias, ignore_index), softcap=head.softcap, impl=impl
    )


def token_log_probabilities(
    outputs: Outputs, targets: Tensor, *, ignore_index: int = IGNORE_INDEX, impl: Implementation = "auto"
) -> Tensor:
    """Return log p of the targets, (...), 0 where one doesn't count; arguments as for :func:`rows_of`."""
    target, lse = rows_of(outputs, targets, ignore_index=ignore_index, impl=impl)(Target(), LogSumExp())
    return target - lse


def answer_log_probabilities(
    outputs: Outputs, targets: Tensor, *, ignore_index: int = IGNORE_INDEX, impl: Implementation = "auto"
) -> Tensor:
    """Return log p of whole answers, the sum over the last axis of the targets (..., L); see above."""
    return token_log_probabilities(outputs, targets, ignore_index=ignore_index, impl=impl).sum(-1)


def _offsets(offset: Tensor | float, like: Tensor) -> Tensor | None:
    if isinstance(offset, Tensor):
        return offset.reshape(like.shape)
    return torch.full_like(like, offset) if offset else None
