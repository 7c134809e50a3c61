"""Refusing the gradient of a gradient."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiable(backward: Backward) -> Backward:
    """Run a backward pass outside of autograd, and make its results refuse to be differentiated.

    torch's decorator of this name does so only if the upstream gradient itself requires one. Otherwise a
    gradient penalty beside a loss would silently be a constant. The inputs must be among the saved tensors.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *upstream)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return found
        inputs = [x for x in ctx.saved_tensors if x is not None and x.requires_grad]
        return tuple(None if value is None else _Refuse.apply(value, *inputs) for value in found)

    return wrapped


class _Refuse(torch.autograd.Function):
    """The identity, without a derivative."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *_: Tensor) -> Tensor:  # noqa: ARG004
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # noqa: ARG004
        raise RuntimeError("the head's gradient can't be differentiated again; that of impl='reference' can")
