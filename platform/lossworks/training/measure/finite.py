"""Losses and gradients that are not finite, found before they change a parameter."""

import math

from torch import Tensor, nn

from lossworks.errors import NonFiniteLossError
from lossworks.training.distributed.world import World
from lossworks.training.optimizer import non_finite_gradients


def refuse_non_finite(what: str, step: int, values: Tensor) -> None:
    """Check one value of every rank, shape (ranks,).

    Raises:
        NonFiniteLossError: Naming what it is, the step and the ranks.
    """
    ranks = tuple(values.isfinite().logical_not().nonzero().squeeze(1).tolist())
    if ranks:
        named = ", ".join(map(str, ranks))
        raise NonFiniteLossError(
            f"the {what} became NaN or infinite at step {step} on rank {named}", step=step, ranks=ranks
        )


def blame_gradient(model: nn.Module, step: int, world: World) -> None:
    """Say whose gradient made the norm over all ranks not finite; every rank calls.

    Raises:
        NonFiniteLossError: Always, naming the ranks and a parameter.
    """
    bad = non_finite_gradients(model)
    flags = world.gather([math.nan if bad else 0.0])[:, 0]
    where = world.agree(bad[0] if bad else "the norm of finite gradients overflowed")
    refuse_non_finite(f"gradient ({where})", step, flags if flags.isnan().any() else flags * math.nan)
