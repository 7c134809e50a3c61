"""torch besides its documented interface: kernels that move many tensors at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


def add_scaled(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: float) -> None:
    """Add to each tensor, in place, another one times a factor."""
    torch._foreach_add_(list(tensors), list(others), alpha=factor)


def fused_adamw(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> None:
    """Take a step of AdamW in place: parameters and both moments, which are in the same order.

    Args:
        params: Any shapes.
        gradients: Contiguous, shaped like the parameters.
        first: First moments.
        second: Second moments.
        step: Steps taken with this one, a scalar, of all.
        lr: Learning rate.
        betas: Decay of the moments.
        weight_decay: Decoupled decay.
        eps: Added to the root of the second moment.
    """
    torch._fused_adamw_(
        list(params),
        list(gradients),
        list(first),
        list(second),
        [],
        [step] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
