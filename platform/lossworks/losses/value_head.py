"""What regression by classification shares: heads of bins that stand for a value."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Kind
from lossworks.errors import UserError
from lossworks.losses.interface import Context, Loss
from lossworks.losses.rows import wide


class ValueLoss(Loss):
    """Regression by classification: cross-entropy of m bins against a spread-out target.

    An element whose target isn't known has weight 0; its target may be NaN then. The least loss is the
    entropy of the target's distribution and not 0.
    """

    kind: ClassVar[Kind] = "value"
    invariances = ("shift",)

    bins: int
    v_min: float
    v_max: float

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.v_min >= self.v_max:
            raise UserError(f"{self.slug}: v_min={self.v_min:g} must be below v_max={self.v_max:g}")

    def support(self, like: Tensor) -> Tensor:
        """Return the values that the bins stand for, shape (m,), in the dtype and on the device of ``like``.

        They are made anew at every call: so they follow the logits to any device, and ``half()`` of the
        module around doesn't round them.
        """
        raise NotImplementedError

    def distribution(self, targets: Tensor, context: Context) -> Tensor:
        """Return q of targets within the support or beyond it, (...) to (..., m), without a gradient."""
        raise NotImplementedError

    def decode(self, logits: Tensor) -> Tensor:
        """Return the predicted values Σ p_i v_i of logits (..., m), shape (...), float32 at least."""
        self._require_bins(logits)
        logits = wide(logits)
        return logits.softmax(-1) @ self.support(logits)

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of targets, by which a training loop divides."""
        return torch.tensor(targets.numel(), device=targets.device)

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss.

        Args:
            logits: Shape (..., m); half precision is read in float32.
            targets: Values, floating point, shape (...); those beyond the support count as its ends.
            given: Fields of :class:`lossworks.losses.Context`.

        Returns:
            A scalar, or (...) for ``reduction="none"``; float32 at least.
        """
        context = self.context(given)
        self._require_bins(logits)
        self.require_shape("targets", targets, logits[..., 0])
        logits = wide(logits)
        known = torch.ones_like(targets, dtype=torch.bool)
        if context.weight is not None:
            self.require_shape("weight", context.weight, targets)
            known = context.weight > 0
        with torch.no_grad():
            q = self.distribution(torch.where(known, targets, 0).to(logits), context)
        values = -(q * logits.log_softmax(-1)).sum(-1)
        return self.reduce_elements(values, known, context)

    def _require_bins(self, logits: Tensor) -> None:
        if logits.shape[-1] != self.bins:
            raise UserError(f"{self.slug}: logits {tuple(logits.shape)} must have bins={self.bins} a value")
