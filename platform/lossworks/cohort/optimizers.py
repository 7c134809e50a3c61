"""Optimisers of stacked parameters, with hyperparameters that may differ by member.

torch's own take one number for all; the rules here are theirs, M members at once.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self

import torch
from torch import Tensor

from lossworks.adapters.torch_private import add_scaled, fused_adamw
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

    def of(self, place: int) -> Self:
        """Return a new optimiser of the member at a place alone."""
        lr, decay = (
            value[place : place + 1] if isinstance(value, Tensor) else value
            for value in (self.lr, self.weight_decay)
        )
        return replace(self, lr=lr, weight_decay=decay)

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
        add_scaled(params, gradients, -float(self.lr))
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


@dataclass(frozen=True)
class AdamWSettings:
    """Hyperparameters of AdamW (Loshchilov and Hutter 2019) besides the learning rate.

    Attributes:
        betas: β₁ and β₂, decay of the moments.
        eps: ε, added to the root of the second.
        weight_decay: λ, of parameters with two or more axes; others don't decay.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def move(
        self, moved: Sequence[Sequence[Tensor]], gradients: Sequence[Tensor], step: Tensor, lr: float
    ) -> None:
        """Take a step in place, by torch's fused kernel.

        It reads and writes a parameter and its moments once, where separate operations would take ten passes;
        for many small models these would be most of the time.

        Args:
            moved: Parameters, first moments and second moments, in the same order; all matrices, or none.
            gradients: Of the parameters, contiguous: the kernel reads memory in the parameter's order.
            step: Steps taken with this one, a scalar.
            lr: η.
        """
        params, first, second = moved
        fused_adamw(
            params,
            gradients,
            first,
            second,
            step,
            lr=lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            eps=self.eps,
        )

    def without_decay(self) -> "AdamWSettings":
        """Return the same for parameters that don't decay."""
        return replace(self, weight_decay=0.0)


@dataclass
class AdamW(Optimizer):
    """AdamW as ``torch.optim.AdamW``; parameters with one axis don't decay.

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
        first, second, steps = kept or (torch.zeros_like(param), torch.zeros_like(param), 0)
        self._moments[name] = first[:size], second[:size], steps + 1
        moved = param.clone(), first[:size], second[:size]
        count = torch.tensor(float(steps + 1))
        for members, lr, settings in self._alike(param):
            parts = [[value[members]] for value in moved]
            settings.move(parts, [gradient[members].contiguous()], count, lr)
        return moved[0] - param

    def _alike(self, param: Tensor) -> Iterator[tuple[slice, float, AdamWSettings]]:
        """Yield rows of members with one learning rate and decay; the first axis is the members'."""
        decays = param.dim() > 2
        each = [self._of(index) for index in range(len(param))]
        start = 0
        for (lr, decay), group in groupby(each):
            stop = start + len(list(group))
            settings = AdamWSettings(self.betas, self.eps, decay if decays else 0.0)
            yield slice(start, stop), lr, settings
            start = stop

    def _of(self, member: int) -> tuple[float, float]:
        lr, decay = (
            float(value[member]) if isinstance(value, Tensor) else value
            for value in (self.lr, self.weight_decay)
        )
        return lr, decay


@dataclass(eq=False)
class _Group:
    """Parameters of all members whose steps are alike: matrices, which decay, or others."""

    settings: AdamWSettings
    rate: Callable[[int], float]
    step: Tensor
    moved: list[list[Tensor]]  # parameters, first and second moments
    places: list[tuple[int, int]]  # parameter and member, in the same order


class ScheduledAdamW:
    """AdamW on stacks whose members have hyperparameters, schedules and numbers of steps of their own.

    Args:
        members: Of each member the settings, the learning rate at a step, and the steps taken; members with
            equal ones are moved together.
        params: Parameters, (M, …); they and the moments are moved in place.
        first: First moments.
        second: Second moments.
    """

    def __init__(
        self,
        members: Sequence[tuple[AdamWSettings, Callable[[int], float], int]],
        params: Stack,
        first: Stack,
        second: Stack,
    ) -> None:
        views = [[value.unbind(0) for value in of.values()] for of in (params, first, second)]
        dims = [value.dim() for value in params.values()]
        alike: dict[object, list[int]] = defaultdict(list)
        for index, member in enumerate(members):
            alike[member].append(index)
        self._groups: list[_Group] = []
        for indices in alike.values():
            settings, rate, steps = members[indices[0]]
            for own, parts in _by_decay(dims, settings):
                places = [(part, index) for part in parts for index in indices]
                moved = [[of[part][index] for part, index in places] for of in views]
                self._groups.append(_Group(own, rate, torch.tensor(float(steps)), moved, places))

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move the parameters in place by gradients (M, …), in the order of the parameters."""
        views = [gradient.contiguous().unbind(0) for gradient in gradients]
        for group in self._groups:
            group.step += 1
            own = [views[part][index] for part, index in group.places]
            group.settings.move(group.moved, own, group.step, group.rate(int(group.step)))


def _by_decay(dims: Sequence[int], settings: AdamWSettings) -> Iterator[tuple[AdamWSettings, list[int]]]:
    """Yield which parameters decay alike: matrices, and others, which don't; stacks have one more axis."""
    if not settings.weight_decay:
        yield settings, list(range(len(dims)))
        return
    for own, matrices in ((settings, True), (settings.without_decay(), False)):
        if parts := [part for part, dim in enumerate(dims) if (dim > 2) == matrices]:
            yield own, parts
