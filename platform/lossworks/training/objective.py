"""The training objective that a spec names."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lossworks.head import VocabParallel
from lossworks.head.core.arguments import Implementation
from lossworks.losses import Loss, RowLoss, create, declaration
from lossworks.models import Head
from lossworks.specs import LossSpec
from lossworks.training.batches import IGNORE_INDEX
from lossworks.training.vocabulary import gather_rows, head_group


@dataclass(frozen=True, eq=False)
class HeadObjective:
    """The summed loss as a function of features, head and targets.

    Losses sum and the trainer divides, once, by the count of valid elements over all ranks and micro-batches:
    a mean of means would weigh elements by where they happen to lie. With a head that is split over ranks
    each returns an equal share of the loss of all ranks' rows.

    Attributes:
        loss: With ``reduction="sum"``.
        impl: How the head is computed; see :func:`lossworks.linear_cross_entropy`.
    """

    loss: RowLoss
    impl: Implementation

    def __call__(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        """Return the sum over the targets (...) that count, for ``hidden`` (..., D)."""
        group = head_group(head)
        if group is None:
            return self._summed(hidden, head, targets)
        rows, targets = gather_rows(hidden, targets, group)
        parallel = VocabParallel(group, reduce_e=False)  # the rows' backward pass sums, and scatters at once
        # Every rank has the loss of all rows now; shares of it sum to it.
        return self._summed(rows, head, targets, parallel) / group.size()

    def count(self, targets: Tensor) -> int:
        """Return how many elements of the sum count: rows, or sequences where the loss is of those."""
        return int(self.loss.count(targets))

    def _summed(
        self, rows: Tensor, head: Head, targets: Tensor, parallel: VocabParallel | None = None
    ) -> Tensor:
        return self.loss.linear(
            *(rows, head.weight, targets, head.bias),
            softcap=head.softcap,
            impl=self.impl,
            vocab_parallel=parallel,
        )


@dataclass(frozen=True, eq=False)
class BatchObjective:
    """The loss of whole batches, each micro-batch of a worker being one; parts weigh alike.

    Attributes:
        loss: With ``reduction="mean"``, of logits.
    """

    loss: Loss

    def __call__(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        """Return the loss of targets (B,) for ``hidden`` (B, D); 0 where none counts."""
        return self.loss(head.logits(hidden), targets) * self.count(targets)

    def count(self, targets: Tensor) -> int:
        """Return 1, or 0 for a stand-in that holds no example."""
        return int((targets != IGNORE_INDEX).any())


TrainedObjective = HeadObjective | BatchObjective


def build_objective(spec: LossSpec) -> TrainedObjective:
    """Return the objective that ``spec`` names."""
    if "whole-batch" in declaration(spec.name).flags:
        return BatchObjective(_create(spec, "mean"))
    return HeadObjective(_create(spec, "sum"), spec.impl)


@dataclass(frozen=True, eq=False)
class ElementLosses:
    """The trained loss of single elements, for telemetry; called inside a model's forward.

    Args:
        spec: The loss.
    """

    spec: LossSpec

    def probe(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        """Return loss, gradient norm at the logits and norm of the logits, one row each.

        Args:
            hidden: Shape (B, …, D).
            head: The head.
            targets: Shape (B, …), R of which count.

        Returns:
            Shape (3, R): NaN where there are fewer losses than rows of logits, as of sequences, or none, as
            of whole batches.
        """
        logits = head.logits(hidden).float().detach().requires_grad_()
        valid = targets != IGNORE_INDEX
        with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
            values = _create(self.spec, "none")(logits, targets)
            (slope,) = torch.autograd.grad(values.sum(), logits)
        values = self._of_elements(values.detach(), targets)
        losses = logits.new_full((int(valid.sum()),), math.nan)
        losses[: len(values)] = values
        return torch.stack((losses, slope[valid].norm(dim=-1), logits.detach()[valid].norm(dim=-1)))

    def of_examples(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        """Return the mean loss of each example (B,) without building the logits; (0,) for whole batches."""
        loss = _create(self.spec, "none")
        if not isinstance(loss, RowLoss):
            return hidden.new_zeros(0)
        values = HeadObjective(loss, self.spec.impl)(hidden, head, targets)
        if values.dim() == 1:
            return values
        valid = (targets != IGNORE_INDEX).flatten(1).sum(1).clamp(min=1)
        return values.flatten(1).sum(1) / valid

    def _of_elements(self, values: Tensor, targets: Tensor) -> Tensor:
        if "whole-batch" in declaration(self.spec.name).flags:
            return values[:0]
        return values[targets != IGNORE_INDEX] if values.shape == targets.shape else values.flatten()


def _create(spec: LossSpec, reduction: Literal["mean", "sum", "none"]) -> Any:
    return create(spec.name, reduction=reduction, ignore_index=IGNORE_INDEX, **spec.hyperparameters)
