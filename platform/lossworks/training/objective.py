"""The training objective that a spec names."""

from functools import partial

from torch import Tensor

from lossworks.head import VocabParallel, linear_cross_entropy
from lossworks.models import Head, Objective
from lossworks.specs import LossSpec
from lossworks.training.batches import IGNORE_INDEX
from lossworks.training.vocabulary import gather_rows, head_group


def build_objective(spec: LossSpec) -> Objective:
    """Return the summed loss as a function of features, head and targets.

    Losses sum and the trainer divides, once, by the count of valid tokens over all ranks and micro-batches:
    a mean of means would weigh tokens by where they happen to lie. With a head that is split over ranks each
    returns an equal share of the loss of all ranks' tokens.
    """
    return partial(_cross_entropy, spec.impl)


def _cross_entropy(impl: str, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    group = head_group(head)
    if group is None:
        return _summed(impl, hidden, head, targets)
    rows, targets = gather_rows(hidden, targets, group)
    parallel = VocabParallel(group, reduce_e=False)  # the rows' backward pass sums, and scatters at once
    # Every rank has the loss of all tokens now; shares of it sum to it.
    return _summed(impl, rows, head, targets, parallel) / group.size()


def _summed(
    impl: str, rows: Tensor, head: Head, targets: Tensor, parallel: VocabParallel | None = None
) -> Tensor:
    return linear_cross_entropy(  # type: ignore[return-value]  # one tensor, since nothing more is asked for
        rows,
        head.weight,
        targets,
        head.bias,
        softcap=head.softcap,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        impl=impl,  # type: ignore[arg-type]  # LossSpec allows no other
        vocab_parallel=parallel,
    )
