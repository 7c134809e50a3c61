"""Optimisers of stacked parameters, with hyperparameters that may differ by member.

torch's own take one number for all; the rules here are theirs, M members at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossworks.cohort.stacked import Stack

PerMember = float | Tensor
"""One number for all members, or one each, shape (M,)."""


def by_member(value: PerMember, like: Tensor) -> Tensor | float:
    """Return a hyperparameter so that it multiplies a stack of shape (m, …), m ≤ M the first members."""
    if isinstance(value, Tensor):
        return value[: len(like)].to(like).reshape(-1, *[1] * (like.dim() - 1))
    return value


@dataclass
class Optimizer(ABC):
    """A rule from gradients to steps, with its state; make a new one for each training.

    Attributes:
        lr: Learning rate η.
        weight_decay: λ.
    """

    lr: PerMember
    weight_decay: PerMember = 0.0

    @abstractmethod
    def step(self, name: str, param: Tensor, gradient: Tensor) -> Tensor:
        """Return what is added to a parameter (m, …) of the first m members.

        Args:
            name: The parameter's, by which its state is kept.
            param: Its present value.
            gradient: Of the loss.
        """

    def move(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """Step all parameters in place, and return True, if the rule is simple enough to do so at once."""
        del params, gradients
        return False


@dataclass
class Sgd(Optimizer):
    """Stochastic gradient descent as ``torch.optim.SGD``: g ← g + λw, v ← r·v + g, w ← w − η·v.

    Attributes:
        momentum: r; the first step takes v = g.
    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        self._velocity: Stack = {}

    def move(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """See :class:`Optimizer`."""
        numbers = (self.lr, self.weight_decay)
        if self.momentum or any(isinstance(number, Tensor) for number in numbers) or self.weight_decay:
            return False
        torch._foreach_add_(list(params), list(gradients), alpha=-float(self.lr))
        return True

    def step(self, name: str, param: Tensor, gradient: Tensor) -> Tensor:
        """See :class:`Optimizer`."""
        if isinstance(self.weight_decay, Tensor) or self.weight_decay:
            gradient = gradient + by_member(self.weight_decay, param) * param
        if self.momentum:
            kept = self._velocity.get(name)
            gradient = gradient if kept is None else self.momentum * kept[: len(gradient)] + gradient
            self._velocity[name] = gradient
        return -by_member(self.lr, param) * gradient


@dataclass
class AdamW(Optimizer):
    """AdamW as ``torch.optim.AdamW`` (Loshchilov and Hutter 2019); parameters with one axis don't decay.

    Attributes:
        betas: β₁ and β₂, decay of the moments.
        eps: ε, added to the root of the second.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self._moments: dict[str, tuple[Tensor, Tensor, int]] = {}

    def step(self, name: str, param: Tensor, gradient: Tensor) -> Tensor:
        """See :class:`Optimizer`."""
        size = len(gradient)
        kept = self._moments.get(name)
        first, second, steps = kept or (torch.zeros_like(gradient), torch.zeros_like(gradient), 0)
        first = torch.lerp(first[:size], gradient, 1 - self.betas[0])
        second = self.betas[1] * second[:size] + (1 - self.betas[1]) * gradient.square()
        steps += 1
        self._moments[name] = first, second, steps
        corrected = first / (1 - self.betas[0] ** steps)
        root = (second / (1 - self.betas[1] ** steps)).sqrt() + self.eps
        rate = by_member(self.lr, param)
        decays = param.dim() > 2  # the first axis is the members'
        decay = by_member(self.weight_decay, param) * param if decays else 0.0
        return -rate * (corrected / root + decay)
