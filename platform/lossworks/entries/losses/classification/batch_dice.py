"""Dice, self-adjusting Dice and Tversky losses of a whole batch.

N examples, K classes, C of which count; the formulas are those of ``dice``, of sums over the batch.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Case, Paper, choice
from lossworks.data.batch import Batch
from lossworks.entries.losses.classification.dice import (
    ALPHA,
    DETACH,
    FALSE_ALARMS,
    MISSES,
    AdjustedDice,
    PlainDice,
    TverskyIndex,
    counted,
    smoothing,
    squares,
)
from lossworks.errors import UserError
from lossworks.head.core.valid_rows import check_range
from lossworks.losses.interface import Loss
from lossworks.models.interface import Outputs

_BATCH_CLASSES = choice(
    "all",
    "which classes have a loss: all, or all but the first, the background; one logit an example has one",
    ("all", "but-first"),
)


class _OfBatches(PlainDice, Loss):
    """The form of a whole batch, the released code's for two classes.

    Micro-batches, ranks and clients add ``statistics`` and not losses: take them without a gradient first,
    then descend on ``statistics · g`` of each part, where g is the gradient of ``value`` at their total.
    """

    adds = "statistics"
    kind: ClassVar[str] = "logits"
    paper = Paper(
        "Dice Loss for Data-imbalanced NLP Tasks",
        "Li, Sun, Meng, Liang, Wu, Li",
        2020,
        "section 3, over a batch as in the authors' code",
    )
    invariances = ("shift",)
    flags = ("whole-batch",)
    example: ClassVar[str] = "lossworks train jobs/specs/digits.yaml loss={slug}"
    classes: str

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of a batch.

        Args:
            logits: z, shape (..., K); or (...) as the targets, one logit an example against 0.
            targets: y in [0, K) or ``ignore_index``, int64, shape (...).
            given: ``weight`` of each example in the sums, shape (...).

        Returns:
            One loss a class, (C,), for ``reduction="none"``, else their sum or mean, a scalar; float32 at
            least.
        """
        return self._from(self.statistics(logits, targets, **given))

    def sums(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """Return :meth:`statistics` in one line, shape (3·C,)."""
        del how
        return self.statistics(outputs.logits, batch["targets"], **self.given(batch)).flatten()

    def value(self, sums: Tensor, count: float = 1.0) -> Tensor:
        """Return the loss of statistics over all parts of a batch, shape (3·C,); reduced like ``forward``."""
        del count
        return self._from(sums.reshape(-1, 3))

    def statistics(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return overlap, predicted and actual size of each class, shape (C, 3); arguments as forward's."""
        context = self.context(given)
        targets, weight = self.counting(targets, context), context.weight
        valid = targets != self.ignore_index
        if logits.shape == targets.shape:
            logits, classes = torch.stack((torch.zeros_like(logits), logits), -1), "but-first"
        else:
            classes = self.classes
        self._check(logits, targets)
        log_p, actual = counted(logits, targets, valid, classes)
        soft = self.soft(log_p)
        parts = torch.stack((soft * actual, self.size(soft), actual), -1).flatten(0, -3)
        share = valid.to(parts.dtype) if weight is None else torch.where(valid, weight.detach(), 0)
        return torch.einsum("n,nck->ck", share.reshape(-1).to(parts.dtype), parts)

    def _from(self, sums: Tensor) -> Tensor:
        values = self.ratio(*sums.unbind(-1))
        return self.reduce(values, torch.ones_like(values))

    def _check(self, logits: Tensor, targets: Tensor) -> None:
        if logits.shape[:-1] != targets.shape:
            either = f"{(*targets.shape, 'K')} or {tuple(targets.shape)}"
            raise UserError(f"{self.slug}: logits {tuple(logits.shape)} must be {either}")
        if targets.dtype != torch.int64:
            raise UserError(f"{self.slug}: targets are {targets.dtype}; they must be torch.int64")
        check_range(targets.reshape(-1), classes=logits.shape[-1], ignore_index=self.ignore_index)


class BatchDice(_OfBatches):
    """Dice loss of a whole batch: on hard predictions and with γ = 0 exactly 1 - F1.

    It needs several positives in a batch.
    """

    slug = "batch-dice"
    formula = "1 - (2 Σ p y + γ)/(Σ p² + Σ y² + γ) over the batch, for each class"
    cases = (Case({"square": True}, "batch-self-adjusting-dice", {"alpha": 0.0}),)

    gamma: float = smoothing(zero=True)
    square: bool = squares(True)
    classes: str = _BATCH_CLASSES


class BatchSelfAdjustingDice(AdjustedDice, _OfBatches):
    """Self-adjusting Dice loss of a whole batch, as the authors train.

    The released code for many classes divides each example's overlap by the batch's sums; this doesn't.
    """

    slug = "batch-self-adjusting-dice"
    formula = "1 - (2 Σ u y + γ)/(Σ u² + Σ y² + γ) with u = (1-p)^α p, for each class"
    cases = (Case({"alpha": 0.0}, "batch-dice"),)

    alpha: float = ALPHA
    gamma: float = smoothing(zero=True)
    square: bool = squares(True)
    detach_weight: bool = DETACH
    classes: str = _BATCH_CLASSES


class BatchTversky(TverskyIndex, _OfBatches):
    """Tversky loss of a whole batch: β above α raises recall, below it precision."""

    slug = "batch-tversky"
    formula = "1 - (TP + γ)/(TP + α FP + β FN + γ) with soft counts of the batch, for each class"
    cases = (Case({"alpha": 0.5, "beta": 0.5, "gamma": 0.5}, "batch-dice", {"square": False}),)

    alpha: float = FALSE_ALARMS
    beta: float = MISSES
    gamma: float = smoothing(zero=True)
    classes: str = _BATCH_CLASSES
