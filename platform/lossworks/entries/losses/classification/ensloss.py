"""EnsLoss: at every step the derivative of another convex, calibrated margin loss."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer, number
from lossworks.errors import UserError
from lossworks.losses.interface import Loss
from lossworks.losses.problems import Problem
from lossworks.losses.random_stream import RandomStream
from lossworks.losses.rows import wide
from lossworks.models.interface import Outputs

_STEEPEST, _FLOOR = 1.0, 1e-6  # of a derivative: clipped at the one, and the other taken off, so that g < 0
_MARGINS, _POWERS = range(2)  # what a draw is for


def inverse_box_cox(normal: Tensor, power: float) -> Tensor:
    """Return max(0, 1 + λξ)^(1/λ), e^ξ at λ = 0, of numbers ξ of any shape; at most 1."""
    logs = normal if power == 0 else torch.log1p((power * normal).clamp(min=-1)) / power
    return logs.clamp(max=0).exp()


def derivatives(margins: Tensor, normal: Tensor, power: float) -> Tensor:
    """Return the random loss's derivative at every margin, negative, shape (B,).

    The steepest drawn goes to the smallest margin and so on: then they don't fall with the margin, as a
    convex loss's don't. Beyond 1 they are divided by the margin, which bounds the loss from below.

    Args:
        margins: m, shape (B,).
        normal: ξ from N(0, 1), shape (B,).
        power: λ in [-1, 1].
    """
    drawn = -(inverse_box_cox(normal, power) * _STEEPEST)
    order = margins.argsort(stable=True)
    g = torch.empty_like(drawn).scatter(0, order, drawn.sort().values)
    return g / margins.clamp(min=1) - _FLOOR


class EnsLoss(Loss):
    """EnsLoss: descends on a random convex, calibrated loss of the margin, another one at every step.

    It works like dropout over losses. The value that it returns, the mean of g·m, is no loss: don't stop,
    schedule or compare by it. After ``eval()`` it returns the logistic loss, draws nothing, and can be
    watched. A step needs its whole batch at once: micro-batches or ranks each draw a loss of their own.

    The random numbers are a function of the seed and of how many draws came before, the same on every device;
    their count is in the ``state_dict``, so that a run resumes where it was.
    """

    slug = "ensloss"
    kind: ClassVar[str] = "margin"
    adds = "batches"
    formula = "mean sg(g_i) m_i with m = (2y-1) f, g sorted like m, -g = min(1, (1 + λξ)^(1/λ))/max(1, m)"
    paper = Paper("EnsLoss: Stochastic Calibrated Loss Ensembles", "Dai", 2024, "algorithm 1")
    flags = ("random", "unmonitored", "whole-batch")
    example = "lossworks train jobs/specs/digits.yaml loss={slug} data.classes=[3,8]"

    power: float = number(
        0.0,
        "λ of the inverse Box-Cox transform; 0 is lognormal, of which half is clipped to a hinge's slope",
        ge=-1,
        le=1,
        search=(-1, 1),
    )
    period: int | None = integer(
        None,
        "steps after which λ is drawn anew from U(-1, 1), the paper's epochs; null keeps it",
        ge=1,
        optional=True,
    )
    seed: int = integer(0, "of the random numbers; give each member and client its own", ge=0)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stream = RandomStream(self.seed)

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`."""
        logits = torch.randn(rows, dtype=torch.float64, generator=generator)
        return Problem(logits, torch.randint(0, 2, (rows,), generator=generator))

    def prediction(self, outputs: Outputs) -> Tensor:
        """Return the one logit of two classes, z_1 - z_0, shape (...)."""
        if outputs.logits.shape[-1] != 2:
            raise UserError(f"{self.slug}: is for two classes, not {outputs.logits.shape[-1]}")
        return outputs.logits[..., 1] - outputs.logits[..., 0]

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the surrogate g·m, whose gradient is that of the loss drawn.

        Args:
            logits: f, shape (...); half precision is read in float32.
            targets: 0, 1 or ``ignore_index``, int64, shape (...).
            given: Fields of :class:`lossworks.losses.Context`.

        Returns:
            A scalar, or (...) for ``reduction="none"``; float32 at least.
        """
        context = self.context(given)
        self.require_shape("logits", logits, targets)
        targets = self.counting(targets, context)
        valid = targets != self.ignore_index
        if bool((valid & (targets != 0) & (targets != 1)).any()):
            raise UserError(f"{self.slug}: targets must be 0, 1 or ignore_index={self.ignore_index}")
        margins = torch.where(valid, (2 * targets - 1) * wide(logits), 0)
        if not self.training:
            return self.reduce_elements(F.softplus(-margins), valid, context)
        g = torch.zeros_like(margins)
        with torch.no_grad():
            g[valid] = self._draw(margins[valid])
        return self.reduce_elements(g * margins, valid, context)

    def _draw(self, margins: Tensor) -> Tensor:
        """Return g of the valid margins, shape (B,), and count the step."""
        power, steps = self.power, self.stream.count()
        if self.period is not None:
            # Of all steps of a period the same, whichever of them a run begins with.
            power = 2 * float(self.stream.of(_POWERS, steps // self.period).random()) - 1
        # Drawn in one dtype, so that the numbers don't depend on the model's precision.
        normal = self.stream.next(_MARGINS).standard_normal(len(margins))
        return derivatives(margins, torch.from_numpy(normal).to(margins), power)
