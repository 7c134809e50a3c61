"""Losses of numbers: heads whose outputs stand for a value, plain or as a histogram.

Shapes: any number of leading axes (...), m outputs of the head a value.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lossworks.errors import UserError
from lossworks.losses.interface import Context, Loss
from lossworks.losses.problems import Problem
from lossworks.losses.rows import wide


class ValueLoss(Loss):
    """A loss of a real target, from the outputs of a head that :meth:`decode` turns into a prediction.

    A target that is NaN isn't known: like one of weight 0 it has no loss and no gradient, whatever the
    outputs there are.
    """

    kind: ClassVar[str] = "value"
    example: ClassVar[str] = "lossworks train jobs/specs/regression.yaml loss={slug}"

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`."""
        outputs = torch.randn(rows, self.outputs, dtype=torch.float64, generator=generator)
        return Problem(outputs, 5 * torch.randn(rows, dtype=torch.float64, generator=generator))

    @property
    def outputs(self) -> int:
        """Return m, the outputs that the head needs for one value."""
        return 1

    def decode(self, outputs: Tensor) -> Tensor:
        """Return the predicted values of outputs (..., m), shape (...), float32 at least.

        Raises:
            UserError: There are more or fewer outputs a value.
        """
        self.require_outputs(outputs)
        return wide(outputs)[..., 0]

    def values(self, outputs: Tensor, targets: Tensor, context: Context) -> Tensor:
        """Return the losses of all elements, shape (...); what they are of unknown targets does not matter.

        Args:
            outputs: Float32 at least, shape (..., m).
            targets: In the same dtype, without a gradient, 0 where they are unknown, shape (...).
            context: Further inputs.
        """
        raise NotImplementedError

    def count(self, targets: Tensor) -> Tensor:
        """Return how many targets are known, by which a training loop divides."""
        return (~targets.isnan()).sum()

    def forward(self, outputs: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss.

        Args:
            outputs: Of the head, floating point, shape (..., m); half precision is read in float32.
            targets: Values, NaN where unknown, shape (...).
            given: Fields of :class:`lossworks.losses.Context`.

        Returns:
            A scalar, or (...) for ``reduction="none"``; float32 at least.

        Raises:
            UserError: The shapes don't fit.
        """
        context = self.context(given)
        self.require_outputs(outputs)
        self.require_shape("targets", targets, outputs[..., 0])
        known = ~self.counting(targets, context).isnan()
        # Chosen first: where nothing is known, the outputs may be anything.
        outputs = torch.where(known[..., None], wide(outputs), 0)
        known_targets = torch.where(known, targets.detach(), 0).to(outputs)
        return self.reduce_elements(self.values(outputs, known_targets, context), known, context)

    def require_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs of another width than m.

        Raises:
            UserError: With the shape, and what it must be.
        """
        if outputs.dim() == 0 or outputs.shape[-1] != self.outputs:
            raise UserError(f"{self.slug}: outputs {tuple(outputs.shape)} must be (..., {self.outputs})")


class HistogramLoss(ValueLoss):
    """Regression by classification: cross-entropy of m bins against a spread-out target.

    The least loss is the entropy of the target's distribution and not 0.
    """

    invariances: ClassVar[tuple[str, ...]] = ("shift",)

    bins: int
    v_min: float
    v_max: float

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.v_min >= self.v_max:
            raise UserError(f"{self.slug}: v_min={self.v_min:g} must be below v_max={self.v_max:g}")

    @property
    def outputs(self) -> int:
        """Return the number of bins."""
        return self.bins

    def support(self, like: Tensor) -> Tensor:
        """Return the values that the bins stand for, shape (m,), in the dtype and on the device of ``like``.

        They are made anew at every call: so they follow the logits to any device, and ``half()`` of the
        module around doesn't round them.
        """
        raise NotImplementedError

    def distribution(self, targets: Tensor, context: Context) -> Tensor:
        """Return q of targets within the support or beyond it, (...) to (..., m)."""
        raise NotImplementedError

    def decode(self, outputs: Tensor) -> Tensor:
        """Return the predicted values Σ p_i v_i of logits (..., m), shape (...), float32 at least."""
        self.require_outputs(outputs)
        logits = wide(outputs)
        return logits.softmax(-1) @ self.support(logits)

    def values(self, outputs: Tensor, targets: Tensor, context: Context) -> Tensor:
        """See :meth:`ValueLoss.values`, of logits; targets beyond the support count as its ends."""
        with torch.no_grad():
            q = self.distribution(targets, context)
        return -(q * outputs.log_softmax(-1)).sum(-1)
