"""A summed loss whose gradient is formed in its forward pass, and scaled in its backward pass."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from lossworks.head.autograd.once_differentiable import once_differentiable

Total = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]
"""From E, C and the bias to a sum and its gradients by them, empty where they are not wanted."""


class FoldedLoss(Function):
    """``apply(e, c, bias, total)`` gives the sum of ``total``, a :data:`Total`, differentiable once."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, c: Tensor, bias: Tensor | None, total: Total) -> Tensor:
        """Take the sum and keep its gradients."""
        found, ctx.gradients = total(e, c, bias)
        ctx.total = total
        ctx.save_for_backward(e, c, bias)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients; they are formed anew the second time."""
        inputs, gradients = ctx.saved_tensors, ctx.gradients
        ctx.gradients = None  # given away: as large as C, they must not stay while the loss has a name
        if gradients is None:
            _, gradients = ctx.total(*inputs)
        scaled = [
            g.mul_(upstream[0]).to(x.dtype) if need else None
            for g, x, need in zip(gradients, inputs, ctx.needs_input_grad, strict=False)
        ]
        return *scaled, None
