"""Dice, self-adjusting Dice and Tversky losses of each example: surrogates of F1.

K classes, C of which count, p = softmax(z), y one-hot. The formulas are of an overlap, a predicted and an
actual size of a class; here those of one example, in ``batch_dice`` their sums over a batch.
"""

from typing import Any

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Case, Paper, choice, number, switch
from lossworks.errors import UserError
from lossworks.head import Gathered
from lossworks.losses.interface import Context, RowLoss
from lossworks.losses.rows import LogitRows, wide

_LEAST = 1e-6  # of 1 − p, whose power has an infinite derivative at 0

ALPHA = number(
    0.01,
    "α: exponent of (1-p), which quiets sure positives; 0 is dice. The loss turns at p = 1/(1+α): 1, the "
    "paper's, makes it least at one half",
    ge=0,
    le=1,
    search=(0, 1),
)
DETACH = switch(False, "no gradient through (1-p)^α, so that a larger p is always better", search=True)
FALSE_ALARMS = number(0.5, "α: weight of false positives", ge=0, search=(0.1, 0.9))
MISSES = number(0.5, "β: weight of missed positives; more raises recall", ge=0, search=(0.1, 0.9))
_CLASSES = choice(
    "target",
    "over which classes an example's loss is the mean: its target's alone, which needs no logits; all; "
    "all but the first, the background, which with two classes is the paper's binary form",
    ("target", "all", "but-first"),
)


def smoothing(*, zero: bool) -> Any:
    """Declare γ, with or without 0."""
    limit = {"ge": 0} if zero else {"gt": 0}
    meaning = "γ: smoothing" + ("; 0 is 1 - F1 of hard predictions" if zero else "")
    return number(1.0, meaning, search=(1e-4, 1), log=True, **limit)


def squares(default: bool) -> Any:
    """Declare whether the denominator has squares."""
    return switch(default, "squares in the denominator", search=True)


def adjusted(log_p: Tensor, alpha: float, *, detach_weight: bool = False) -> Tensor:
    """Return u = (1-p)^α p of log-probabilities, any shape (Li et al. 2020, equation 10)."""
    rest = (-torch.expm1(log_p.clamp(max=0))).clamp(min=_LEAST)
    weight = rest**alpha
    return (weight.detach() if detach_weight else weight) * log_p.exp()


def dice(overlap: Tensor, predicted: Tensor, actual: Tensor, gamma: float) -> Tensor:
    """Return 1 - (2·overlap + γ)/(predicted + actual + γ), shapes alike; 0 where nothing is (equation 6)."""
    whole = predicted + actual + gamma
    return torch.where(whole > 0, 1 - (2 * overlap + gamma) / torch.where(whole > 0, whole, 1), 0)


def tversky(
    overlap: Tensor, predicted: Tensor, actual: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """Return 1 - (TP + γ)/(TP + α·FP + β·FN + γ), shapes alike; 0 where nothing is (equation 8)."""
    false, missed = predicted - overlap, actual - overlap
    whole = overlap + alpha * false + beta * missed + gamma
    return torch.where(whole > 0, 1 - (overlap + gamma) / torch.where(whole > 0, whole, 1), 0)


class PlainDice:
    """Dice: reads γ, and whether the denominator has squares."""

    gamma: float
    square: bool

    def soft(self, log_p: Tensor) -> Tensor:
        """Return how much of a class an example is, from log p, any shape."""
        return log_p.exp()

    def size(self, soft: Tensor) -> Tensor:
        """Return what ``soft`` adds to the predicted size."""
        return soft.square() if self.square else soft

    def ratio(self, overlap: Tensor, predicted: Tensor, actual: Tensor) -> Tensor:
        """Return the loss of sizes, shapes alike."""
        return dice(overlap, predicted, actual, self.gamma)


class AdjustedDice(PlainDice):
    """Self-adjusting Dice: reads α and ``detach_weight`` too."""

    alpha: float
    detach_weight: bool

    def soft(self, log_p: Tensor) -> Tensor:
        """See :meth:`PlainDice.soft`."""
        return adjusted(log_p, self.alpha, detach_weight=self.detach_weight)


class TverskyIndex(PlainDice):
    """Tversky: reads α, β and γ."""

    alpha: float
    beta: float
    square = False

    def ratio(self, overlap: Tensor, predicted: Tensor, actual: Tensor) -> Tensor:
        """See :meth:`PlainDice.ratio`."""
        return tversky(overlap, predicted, actual, self.alpha, self.beta, self.gamma)


def counted(logits: Tensor, targets: Tensor, valid: Tensor, classes: str) -> tuple[Tensor, Tensor]:
    """Return log p and one-hot y of the classes that count, both (..., C); y is 0 where not valid."""
    first = 1 if classes == "but-first" else 0
    if logits.shape[-1] <= first:
        raise UserError(f"classes={classes} needs more than {logits.shape[-1]} class")
    # Chosen before the softmax: where nothing counts, the logits may be anything.
    logits = torch.where(valid[..., None], wide(logits), 0)
    log_p = logits.log_softmax(-1)
    every = torch.arange(logits.shape[-1], device=logits.device)
    actual = ((targets[..., None] == every) & valid[..., None]).to(log_p.dtype)
    return log_p[..., first:], actual[..., first:]


class _OfExamples(PlainDice, RowLoss):
    """The form of each example."""

    paper = Paper(
        "Dice Loss for Data-imbalanced NLP Tasks", "Li, Sun, Meng, Liang, Wu, Li", 2020, "section 3"
    )
    invariances = ("shift",)
    classes: str

    @property
    def needs_logits(self) -> bool:
        """Whether other classes than the target's count."""
        return self.classes != "target"

    @property
    def folds(self) -> bool:
        """Whether ``phi`` is all there is."""
        return not self.needs_logits

    @property
    def per_row(self) -> tuple[str, ...]:
        """All its numbers, where only the target's class counts."""
        numbers = tuple(p.name for p in self.hyperparameters if p.type == "number")
        return () if self.needs_logits else numbers

    def phi(self, target: Tensor, logsumexp: Tensor, classes: int) -> Tensor:  # noqa: ARG002
        """See :meth:`RowLoss.phi`."""
        soft = self.soft((target - logsumexp).clamp(max=0))
        return self.ratio(soft, self.size(soft), torch.ones_like(soft))

    def values(self, rows: LogitRows, context: Context) -> Tensor:
        """See :meth:`RowLoss.values`."""
        if not self.needs_logits:
            return super().values(rows, context)
        every = torch.arange(rows.classes, device=rows.targets.device)
        (logits,) = rows(Gathered(every.expand(*rows.targets.shape, -1)))
        log_p, actual = counted(logits, rows.targets, rows.valid, self.classes)
        soft = self.soft(log_p)
        return self.ratio(soft * actual, self.size(soft), actual).mean(-1)


class Dice(_OfExamples):
    """Dice loss of each example.

    Its gradient vanishes where p does: from scratch on rare positives it ends at predicting none. Use it on a
    model that cross-entropy has warmed up, or ``batch-dice``.
    """

    slug = "dice"
    formula = "1 - (2 p y + γ)/(p² + y² + γ)"
    cases = (Case({"square": False}, "self-adjusting-dice", {"alpha": 0.0}),)

    gamma: float = smoothing(zero=False)
    square: bool = squares(True)
    classes: str = _CLASSES


class SelfAdjustingDice(AdjustedDice, _OfExamples):
    """Self-adjusting Dice loss of each example: Dice of (1-p)^α p.

    The weight that is to quiet easy examples makes sure ones worse: a positive's loss is least at
    p = 1/(1+α), and with α = 1 a negative at p = 1 costs nothing. Hence the scripts' α = 0.01 by default, and
    ``detach_weight``. What is said of ``dice`` about a warm start holds here.
    """

    slug = "self-adjusting-dice"
    formula = "1 - (2 u y + γ)/(u + y + γ) with u = (1-p)^α p"
    cases = (Case({"alpha": 0.0}, "dice", {"square": False}),)

    alpha: float = ALPHA
    gamma: float = smoothing(zero=False)
    square: bool = squares(False)
    detach_weight: bool = DETACH
    classes: str = _CLASSES


class Tversky(TverskyIndex, _OfExamples):
    """Tversky loss of each example: Dice with a weight for false and one for missed positives.

    With ``classes=target`` there are no false positives, and α does nothing.
    """

    slug = "tversky"
    formula = "1 - (p y + γ)/(p y + α p (1-y) + β (1-p) y + γ)"
    cases = (Case({"alpha": 0.5, "beta": 0.5, "gamma": 0.5}, "dice", {"square": False, "gamma": 1.0}),)

    alpha: float = FALSE_ALARMS
    beta: float = MISSES
    gamma: float = smoothing(zero=False)
    classes: str = _CLASSES
