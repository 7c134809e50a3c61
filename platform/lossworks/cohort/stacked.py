"""Stacks of parameters, and a model's forward pass for all members of a stack at once.

Shapes: M members, B examples a member, D features, K classes.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lossworks.adapters.torch_private import drops_at_random, keeps_statistics
from lossworks.cohort.plain_layers import backward_all, forward_all, plain_layers
from lossworks.errors import UserError
from lossworks.models import HeadedModel

Member = dict[str, Tensor]
"""One member's parameters or buffers by name, shape (…)."""

Stack = dict[str, Tensor]
"""The same of M members, shape (M, …)."""


def stack(members: Sequence[Member]) -> Stack:
    """Return members one behind the other.

    Raises:
        UserError: There is none, or they differ in names or shapes.
    """
    if not members:
        raise UserError("a cohort needs at least one member")
    first = members[0]
    for index, member in enumerate(members):
        if {name: value.shape for name, value in member.items()} != {n: v.shape for n, v in first.items()}:
            raise UserError(f"member {index}: its parameters differ from member 0's in names or shapes")
    return {name: torch.stack([member[name] for member in members]) for name in first}


def repeat(member: Member, members: int) -> Stack:
    """Return M copies of one member, each with memory of its own."""
    return {name: value.detach()[None].repeat(members, *[1] * value.dim()) for name, value in member.items()}


def member_of(stacked: Stack, index: int) -> Member:
    """Return one member's parameters, views of the stack."""
    return {name: value[index] for name, value in stacked.items()}


class _FeaturesAndLogits(nn.Module):
    """A model whose forward returns its features and its logits, as functional calls need it."""

    def __init__(self, model: HeadedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model.hidden(inputs)
        return hidden, self.model.head().logits(hidden)


StackedObjective = Callable[[Tensor, Tensor], Tensor]
"""Called with features (M, B, D) and logits (M, B, K); gives one number a member, (M,)."""


class StackedModel:
    """A model as a function of stacked parameters.

    Perceptrons and plain convolutional networks are batched products, see
    :mod:`lossworks.cohort.plain_layers`; other models go through ``torch.func.vmap``. Those whose forward it
    can't take, or that draw random numbers in training, which would differ from those of a member on its own,
    are called member by member; ``reason`` then says why.

    Args:
        model: Gives the architecture; its own parameters are not touched.

    Attributes:
        reason: Why members are called one by one, or None where they are called at once.
    """

    def __init__(self, model: HeadedModel) -> None:
        self._call = _FeaturesAndLogits(model)
        self.reason = self._obstacle(model)
        self._layers = plain_layers(model)

    def __call__(self, params: Stack, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (M, B, D) and logits (M, B, K) of inputs (M, B, …), differentiable."""
        if self.reason is None and self._layers is not None:
            hidden, logits, _ = forward_all(self._layers, params, inputs)
            return hidden, logits
        if self.reason is None:
            return vmap(self._one)(params, inputs)
        parts = [self._one(member_of(params, index), inputs[index]) for index in range(len(inputs))]
        features, outputs = zip(*parts, strict=True)
        return torch.stack(features), torch.stack(outputs)

    def gradients(self, params: Stack, inputs: Tensor, objective: StackedObjective) -> list[Tensor]:
        """Return the gradients of each member's objective, in the order of the parameters.

        Args:
            params: Parameters (M, …).
            inputs: Shape (M, B, …).
            objective: What is descended on; members share no parameter, so each has its own gradient.
        """
        if self.reason is not None or self._layers is None:
            leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
            whole = objective(*self(leaves, inputs)).sum()
            return list(torch.autograd.grad(whole, list(leaves.values())))
        with torch.no_grad():
            hidden, logits, kept = forward_all(self._layers, params, inputs)
        hidden, logits = (value.detach().requires_grad_() for value in (hidden, logits))
        whole = objective(hidden, logits).sum()
        slope, of_hidden = torch.autograd.grad(whole, (logits, hidden), allow_unused=True)
        with torch.no_grad():
            if slope is None:
                slope = torch.zeros_like(logits)
            found = backward_all(self._layers, params, kept, slope, of_hidden)
        return [found[name] for name in params]

    def _one(self, params: Member, inputs: Tensor) -> tuple[Tensor, Tensor]:
        named = {f"model.{name}": value for name, value in params.items()}
        return cast("tuple[Tensor, Tensor]", functional_call(self._call, named, (inputs,)))

    @staticmethod
    def _obstacle(model: HeadedModel) -> str | None:
        for name, module in model.named_modules():
            if drops_at_random(module):
                return f"{name} drops features at random"
            if keeps_statistics(module):
                return f"{name} keeps statistics of its own"
        return None
