"""Ascent on what is to be forgotten, with descent on what is to stay that grows stronger as that suffers."""

from typing import Any

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer, number
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.head.core.arguments import Implementation
from lossworks.losses.unlearning import FORGET, RETAIN, UnlearningLoss, mean_of, nats_and_tokens
from lossworks.models.interface import Outputs


def retain_weight(rise: Tensor, a: float, b: float, c: float, least: float, most: float) -> Tensor:
    """Return α = a·b^ΔL + c between its bounds, and the least where ΔL ≤ 0; shaped like ``rise``.

    Args:
        rise: ΔL, by how many nats a token the loss of what is to stay has risen.
        a: Factor.
        b: Base.
        c: Summand.
        least: α_min.
        most: α_max.
    """
    grown = (a * torch.pow(torch.full_like(rise, b), rise) + c).clamp(least, most)
    return torch.where(rise > 0, grown, least)


class ConstrainedUnlearning(UnlearningLoss):
    """Constrained unlearning: climb the loss of some answers, held by an adaptive weight of the others.

    The weight is that of the whole batch, whatever its micro-batches and ranks, and no path of the gradient.
    ``least = most`` gives a fixed weight, and 0 for both plain gradient ascent.

    Use it where a model has to give up answers it knows by heart and there are examples of what must stay;
    train few layers, which ``optimizer.only`` names and ``lossworks analyse causal-tracing`` finds. Not
    without a ``ceiling`` and few steps: ascent has no end of its own, and a model that is pushed on answers
    worse than one that never saw them, which tells that it did.
    """

    slug = "constrained-unlearning"
    formula = "-CE(forget) + α CE(retain), α = clip(a b^ΔL + c, α_min, α_max), ΔL = CE(retain) - m_0"
    paper = Paper(
        "SHA256 at SemEval-2025 Task 4: Selective Amnesia - Constrained Unlearning via Knowledge Isolation",
        "Kunal Chandra et al.",
        2025,
        "section 3.2",
    )

    a: float = number(0.3, "a: factor of the power", ge=0)
    b: float = number(6.0, "b: base of the power of the rise", gt=0)
    c: float = number(0.8, "c: summand", ge=0)
    least: float = number(1.2, "α_min, which holds while what is to stay does not suffer", ge=0)
    most: float = number(2.8, "α_max; the authors' code has 2.3", ge=0, search=(1.2, 5.0))
    baseline_steps: int = integer(
        10,
        "steps from the start whose mean loss of what is to stay is m_0 (in the paper the first epoch)",
        ge=1,
    )
    ceiling: float = number(
        0.0, "nats a token of what is to be forgotten above which it is climbed no further; 0 for none", ge=0
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.most < self.least:
            raise UserError(f"{self.slug}: most={self.most:g} must be at least least={self.least:g}")
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    baseline: Tensor
    steps: Tensor

    def token_sums(self, outputs: Outputs, targets: Tensor, batch: Batch, impl: Implementation) -> Tensor:
        """Return nats and tokens of both candidates, (4,)."""
        del batch
        return torch.cat([nats_and_tokens(outputs, targets, place, impl) for place in (FORGET, RETAIN)])

    def of_sums(self, sums: Tensor) -> Tensor:
        """See :meth:`UnlearningLoss.of_sums`."""
        forget, retain = mean_of(sums[0], sums[1]), mean_of(sums[2], sums[3])
        climbed = forget.clamp(max=self.ceiling) if self.ceiling else forget
        return -climbed + self.weight_of(retain.detach()) * retain

    def weight_of(self, retain: Tensor) -> Tensor:
        """Return α for the loss of what is to stay, nats a token; a scalar."""
        if int(self.steps) < self.baseline_steps:
            return torch.full_like(retain, self.least)
        rise = retain - self.baseline.to(retain)
        return retain_weight(rise, self.a, self.b, self.c, self.least, self.most)

    def advance(self, sums: Tensor) -> None:
        """Take the mean of the first steps as the baseline m_0; see :meth:`Loss.advance`."""
        if int(self.steps) < self.baseline_steps:
            retain = float(mean_of(sums[2], sums[3]))
            self.baseline += (retain - self.baseline) / (int(self.steps) + 1)
        self.steps += 1
