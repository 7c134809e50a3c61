"""Stacks of parameters, and a model's forward pass for all members of a stack at once.

Shapes: M members, B examples a member, D features, K classes.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lossworks.errors import UserError
from lossworks.models import Classifier, HeadedModel

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


Layers = list[tuple[str, nn.Module]]
"""Names and layers of a perceptron, in order; the head is the last."""

_OF_PERCEPTRONS = (nn.Flatten, nn.Linear, nn.ReLU)


def _perceptron(model: HeadedModel) -> Layers | None:
    """Return the layers of a model that is a perceptron and nothing else, else None."""
    if not isinstance(model, Classifier):
        return None
    found: Layers = []
    for index, block in enumerate(model.layers):
        if not isinstance(block, nn.Sequential) or any(type(part) not in _OF_PERCEPTRONS for part in block):
            return None
        found += [(f"layers.{index}.{place}", part) for place, part in enumerate(block)]
    return [*found, ("classifier", model.classifier)]


class _StackedLinear(torch.autograd.Function):
    """x·Wᵀ + b for every member.

    Autograd's own gradient of a transposed product is a transposed one, which makes every later step on the
    weights slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.transpose(1, 2)).add_(bias[:, None])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (slope,) = slopes
        of_x = torch.bmm(slope, weight) if ctx.needs_input_grad[0] else None
        return of_x, torch.bmm(slope.transpose(1, 2), x), slope.sum(1)


def _products(layers: Layers, params: Stack, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits of perceptrons, each layer one batched product."""
    x = hidden = inputs
    for name, layer in layers:
        hidden = x
        if isinstance(layer, nn.Flatten):
            x = x.flatten(2)
        elif isinstance(layer, nn.ReLU):
            x = x.relu()
        else:
            x = _StackedLinear.apply(x, params[f"{name}.weight"], params[f"{name}.bias"])
    return hidden, x


class StackedModel:
    """A model as a function of stacked parameters.

    Perceptrons are batched matrix products, which take a third of the time of ``torch.func.vmap``; other
    models go through that. Those whose forward it can't take, or that draw random numbers in training, which
    would differ from those of a member on its own, are called member by member; ``reason`` then says why.

    Args:
        model: Gives the architecture; its own parameters are not touched.

    Attributes:
        reason: Why members are called one by one, or None where they are called at once.
    """

    def __init__(self, model: HeadedModel) -> None:
        self._call = _FeaturesAndLogits(model)
        self.reason = self._obstacle(model)
        self._layers = _perceptron(model)

    def __call__(self, params: Stack, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (M, B, D) and logits (M, B, K) of inputs (M, B, …), differentiable."""
        if self.reason is None and self._layers is not None:
            return _products(self._layers, params, inputs)
        if self.reason is None:
            return vmap(self._one)(params, inputs)
        parts = [self._one(member_of(params, index), inputs[index]) for index in range(len(inputs))]
        hidden, logits = zip(*parts, strict=True)
        return torch.stack(hidden), torch.stack(logits)

    def _one(self, params: Member, inputs: Tensor) -> tuple[Tensor, Tensor]:
        named = {f"model.{name}": value for name, value in params.items()}
        return cast("tuple[Tensor, Tensor]", functional_call(self._call, named, (inputs,)))

    @staticmethod
    def _obstacle(model: HeadedModel) -> str | None:
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                return f"{name} drops features at random"
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                return f"{name} keeps statistics of its own"
        return None
