"""The training objective that a spec names."""

from dataclasses import dataclass

from torch import Tensor

from lossworks.head import VocabParallel
from lossworks.head.arguments import Implementation
from lossworks.losses import RowLoss, create
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


def build_objective(spec: LossSpec) -> HeadObjective:
    """Return the objective that ``spec`` names."""
    loss = create(spec.name, reduction="sum", ignore_index=IGNORE_INDEX, **spec.hyperparameters)
    return HeadObjective(loss, spec.impl)
