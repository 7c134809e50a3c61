"""Label-distributionally robust losses: one temperature for all rows, or one that each row finds."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Case, Paper, choice, integer, number
from lossworks.head import ExpectedLogit, LogSumExp, Target
from lossworks.losses.interface import Context, RowLoss, flat
from lossworks.losses.rows import LogitRows

_PAPER = Paper(
    "Label Distributionally Robust Losses for Multi-class Classification", "Zhu, Ying, Yang", 2023, "ICML"
)
_NORMALISATION = (
    "what is done to the logits first, as in the authors' code: none; abs-mean (divided by the row's mean "
    "magnitude); softplus-mean (the same after softplus). All but none need the logits"
)
_CHOICES = ("none", "abs-mean", "softplus-mean")
_TINY = 1e-8


class LDR(RowLoss):
    """LDR-KL: the worst-case label distribution under a KL penalty, a temperature with a margin.

    With d_k = z_k − z_y + c·1[k≠y] it is max_p Σ p_k d_k − λ KL(p ‖ 1/K). λ → 0 is the Crammer–Singer hinge,
    λ → ∞ the mean of d, symmetric and robust against wrong labels. The margin is taken off the target's
    logit inside the pass, so that nothing cancels.
    """

    slug = "ldr"
    formula = "λ (lse(d/λ) - log K) with d_k = z_k - z_y + c [k≠y]"
    paper = _PAPER
    invariances = ("shift",)
    cases = (Case({"temperature": 1.0, "margin": 0.0}, "cross-entropy", log_classes=-1.0),)

    temperature: float = number(
        1.0, "λ: 0 the largest violation, ∞ the mean over classes", gt=0, search=(0.1, 10), log=True
    )
    margin: float = number(0.1, "c: by how much the label must lead", ge=0, search=(0, 2))
    normalisation: str = choice("none", _NORMALISATION, _CHOICES)

    @property
    def per_row(self) -> tuple[str, ...]:
        """The names of the temperature λ and the margin c."""
        return ("temperature", "margin")

    @property
    def lse_temperature(self) -> float:
        """The temperature λ of the logsumexp."""
        return self.temperature

    @property
    def target_offset(self) -> float:
        """The margin with its sign turned, −c, which is added to the label's logit."""
        return -self.margin

    @property
    def needs_logits(self) -> bool:
        """Whether the normalisation does."""
        return self.normalisation.endswith("-mean")

    def prepare(self, logits: Tensor) -> Tensor:
        """Divide by the row's mean, where that is the normalisation."""
        return _divided_by_mean(logits, self.normalisation)

    def phi(self, target: Tensor, logsumexp: Tensor, classes: int) -> Tensor:
        """See :meth:`RowLoss.phi`."""
        return logsumexp - target - self.temperature * math.log(classes)


class AdaptiveLDR(RowLoss):
    r"""ALDR-KL: LDR-KL whose temperature each row finds, smaller where the model is confident.

    λ maximises the loss less α log K (λ − λ0)²/(2λ0), which some steps of the fixed point
    λ = λ0 (1 − KL(p* ‖ 1/K)/(α log K)) find from λ0; p* is the softmax of d/λ. λ counts as a constant in the
    gradient, which is exact at the fixed point (envelope theorem). The authors keep one λ per training
    example and take one step a visit; these steps need no memory of examples.

    Against wrong labels the normalisation matters more than λ: without it, or divided by the root mean square
    (which would need no logits), the loss was no better than cross-entropy on digits with half the labels
    redrawn. So the authors' is the default, and ``normalisation=none`` with λ0 = 1 is for large vocabularies.
    """

    slug = "aldr-kl"
    formula = "λ (lse(d/λ) - log K) - α log K (λ-λ0)²/(2 λ0) at the maximising λ"
    paper = _PAPER
    products = 9.0
    cases = (
        Case(
            {"temperature": 1.0, "margin": 0.0, "steps": 0, "normalisation": "none"},
            "cross-entropy",
            log_classes=-1.0,
        ),
    )

    temperature: float = number(
        10.0, "λ0: temperature of a row without any information", gt=0, search=(0.1, 10), log=True
    )
    margin: float = number(0.1, "c: by how much the label must lead", ge=0, search=(0, 2))
    alpha: float = number(2.0, "α: how far λ may leave λ0; ∞ is ldr", gt=1, search=(1.1, 10), log=True)
    steps: int = integer(5, "fixed-point steps a row, each one more pass; 0 is ldr at λ0", ge=0, le=100)
    normalisation: str = choice("abs-mean", _NORMALISATION, _CHOICES)

    @property
    def per_row(self) -> tuple[str, ...]:
        """The names of λ0, of the margin c and of α."""
        return ("temperature", "margin", "alpha")

    @property
    def needs_logits(self) -> bool:
        """Whether the normalisation does."""
        return self.normalisation.endswith("-mean")

    def prepare(self, logits: Tensor) -> Tensor:
        """Divide by the row's mean, where that is the normalisation."""
        return _divided_by_mean(logits, self.normalisation)

    def values(self, rows: LogitRows, context: Context) -> Tensor:  # noqa: ARG002
        """See :meth:`RowLoss.values`."""
        log_classes = math.log(rows.classes)
        temperature = self._fixed_point(rows, log_classes)
        target, lse = rows(Target(), LogSumExp(temperature.reshape(-1)), offset=flat(-self.margin, rows))
        penalty = self.alpha * log_classes / (2 * self.temperature)
        return lse - target - temperature * log_classes - penalty * (temperature - self.temperature).square()

    @torch.no_grad()
    def _fixed_point(self, rows: LogitRows, log_classes: float) -> Tensor:
        """Return λ, shaped like the targets."""
        temperature = torch.zeros_like(rows(Target())[0]) + self.temperature
        for _ in range(self.steps if log_classes else 0):
            own = temperature.reshape(-1)
            lse, expected = rows(LogSumExp(own), ExpectedLogit(own), offset=flat(-self.margin, rows))
            divergence = (expected - lse) / temperature + log_classes
            share = (divergence / (self.alpha * log_classes)).clamp(min=0).clamp(max=1 / self.alpha)
            temperature = self.temperature * (1 - share)
        return temperature


def _divided_by_mean(logits: Tensor, normalisation: str) -> Tensor:
    if normalisation == "softplus-mean":
        logits = F.softplus(logits)
    elif normalisation != "abs-mean":
        return logits
    return logits / (logits.abs().mean(-1, keepdim=True) + _TINY)
