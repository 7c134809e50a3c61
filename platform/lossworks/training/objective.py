"""The training objective that a spec names."""

from functools import partial

from torch import Tensor

from lossworks.head import linear_cross_entropy
from lossworks.models import Head, Objective
from lossworks.specs import LossSpec
from lossworks.training.batches import IGNORE_INDEX


def build_objective(spec: LossSpec) -> Objective:
    """Return the summed loss as a function of features, head and targets.

    Losses sum and the trainer divides, once, by the count of valid tokens over all ranks and micro-batches:
    a mean of means would weigh tokens by where they happen to lie.
    """
    return partial(_cross_entropy, spec.impl)


def _cross_entropy(impl: str, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    return linear_cross_entropy(
        hidden,
        head.weight,
        targets,
        head.bias,
        softcap=head.softcap,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        impl=impl,  # type: ignore[arg-type]  # LossSpec allows no other
    )
