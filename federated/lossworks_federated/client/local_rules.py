"""What clients do besides descending on their loss: the local parts of federated methods.

Each is a hook of :class:`lossworks.cohort.LocalRule`, so one client and a whole cohort run the same code.
w⁰ are the global parameters that a round starts from, w a client's; what a client keeps is a stack with the
clients in the order of the round's batches.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.cohort import LocalRule, Member, Seen, Stack
from lossworks.data.batch import IGNORE_INDEX
from lossworks.head import LogSumExp, SumOfSquares
from lossworks.losses.rows import rows_of
from lossworks.models import Outputs

StackedFeatures = Callable[[Stack, Tensor], Tensor]
"""Takes parameters (m, …) and inputs (m, B, …), and returns features (m, B, …, D), without a gradient."""


class Together(LocalRule):
    """Several rules at once: penalties add up, gradients and updates pass through all in order.

    Args:
        rules: In order.
    """

    def __init__(self, rules: Sequence[LocalRule]) -> None:
        self._rules = tuple(rules)

    def of(self, place: int) -> LocalRule:
        """Return the rules of one client alone."""
        return Together([rule.of(place) for rule in self._rules])

    def penalty(self, seen: Seen) -> Tensor | None:
        """Return the sum of the rules' penalties, shape (m,); None if none of them has one."""
        total: Tensor | None = None
        for rule in self._rules:
            extra = rule.penalty(seen)
            if extra is not None:
                total = extra if total is None else total + extra
        return total

    def gradient(self, name: str, gradient: Tensor, param: Tensor) -> Tensor:
        """Return the gradient (m, …) of a parameter (m, …) after all rules."""
        for rule in self._rules:
            gradient = rule.gradient(name, gradient, param)
        return gradient

    def update(self, name: str, step: Tensor) -> Tensor:
        """Return the optimiser's step (m, …) after all rules."""
        for rule in self._rules:
            step = rule.update(name, step)
        return step


class Proximal(LocalRule):
    """FedProx (Li et al. 2020): the penalty (μ/2)‖w − w⁰‖², whose gradient is μ(w − w⁰).

    Args:
        origin: w⁰.
        mu: μ; 0 is FedAvg.
    """

    def __init__(self, origin: Member, mu: float) -> None:
        self._origin, self._mu = origin, mu

    def gradient(self, name: str, gradient: Tensor, param: Tensor) -> Tensor:
        """Return the gradient (m, …) plus that of the penalty at a parameter (m, …)."""
        return gradient + self._mu * (param - self._origin[name])


class ControlVariates(LocalRule):
    """SCAFFOLD (Karimireddy et al. 2020): the gradient minus the client's drift, g − c_i + c.

    Args:
        everyone: c.
        own: c_i of each client, (M, …).
    """

    def __init__(self, everyone: Member, own: Stack) -> None:
        self._correction = {name: everyone[name] - value for name, value in own.items()}

    def of(self, place: int) -> LocalRule:
        """Return the rule of one client alone."""
        alone = copy(self)
        alone._correction = _only(self._correction, place)
        return alone

    def gradient(self, name: str, gradient: Tensor, param: Tensor) -> Tensor:
        """Return the gradient (m, …) less the client's drift."""
        del param
        return gradient + self._correction[name][: len(gradient)]

    @staticmethod
    def renewed(
        own: Stack, everyone: Member, origin: Member, ended: Stack, steps: Tensor, lr: float
    ) -> Stack:
        """Return the clients' next control variates (M, …), c_i − c + (w⁰ − w)/(K_i η).

        K_i are the steps that were really taken, shape (M,).
        """
        return {
            name: own[name] - everyone[name] + (origin[name] - value) / (_over(steps, value) * lr)
            for name, value in ended.items()
        }


class Dynamic(LocalRule):
    """FedDyn (Acar et al. 2021): the penalty (α/2)‖w − w⁰‖² − ⟨h_i, w⟩.

    Args:
        origin: w⁰.
        own: h_i of each client, (M, …).
        alpha: α.
    """

    def __init__(self, origin: Member, own: Stack, alpha: float) -> None:
        self._origin, self._own, self._alpha = origin, own, alpha

    def of(self, place: int) -> LocalRule:
        """Return the rule of one client alone."""
        return Dynamic(self._origin, _only(self._own, place), self._alpha)

    def gradient(self, name: str, gradient: Tensor, param: Tensor) -> Tensor:
        """Return the gradient (m, …) plus that of the penalty at a parameter (m, …)."""
        return gradient + self._alpha * (param - self._origin[name]) - self._own[name][: len(gradient)]

    @staticmethod
    def renewed(own: Stack, origin: Member, ended: Stack, alpha: float) -> Stack:
        """Return the clients' next linear terms (M, …), h_i − α(w − w⁰)."""
        return {name: own[name] - alpha * (value - origin[name]) for name, value in ended.items()}


class Contrast(LocalRule):
    """MOON (Li, He, Song 2021): features near the global model's and away from the client's previous ones.

    The penalty is μ times the mean over examples of −log(e^{a/T}/(e^{a/T} + e^{b/T})), a and b the cosines of
    a feature with the global and with the previous model's. Features are those the head reads; there is no
    projection head.

    Args:
        features: Gives those of other parameters.
        origin: w⁰.
        previous: Each client's parameters at the end of its last round, (M, …); w⁰ where it had none.
        mu: μ; 0 is FedAvg.
        temperature: T.
    """

    reads: ClassVar[tuple[str, ...]] = ("inputs", "features")

    def __init__(
        self,
        features: StackedFeatures,
        origin: Member,
        previous: Stack,
        mu: float = 1.0,
        temperature: float = 0.5,
    ) -> None:
        self._features, self._origin, self._previous = features, origin, previous
        self._mu, self._temperature = mu, temperature

    def of(self, place: int) -> LocalRule:
        """Return the rule of one client alone."""
        previous = _only(self._previous, place)
        return Contrast(self._features, self._origin, previous, self._mu, self._temperature)

    def penalty(self, seen: Seen) -> Tensor | None:
        """Return the mean contrast of each client, shape (m,), of its features (m, B, …, D)."""
        hidden, count = seen.outputs.hidden, len(seen.inputs)
        whole = {name: value.expand(count, *value.shape) for name, value in self._origin.items()}
        previous = {name: value[:count] for name, value in self._previous.items()}
        towards = self._features(whole, seen.inputs)
        away = self._features(previous, seen.inputs)
        near = F.cosine_similarity(hidden, towards, dim=-1) / self._temperature
        far = F.cosine_similarity(hidden, away, dim=-1) / self._temperature
        return self._mu * _mean(F.softplus(far - near), seen.valid)


class Margin(LocalRule):
    """FedLD's margin control (Zeng, Guo et al. 2024): λ·log(1 + ‖o‖²), against confident outputs.

    ``on="logits", reduce="sample"`` is the paper's: o are the logits of an example, and the penalty is a mean
    over examples. ``on="softmax", reduce="batch"`` is the released code's: o are the softmax outputs of the
    whole batch, and there is one logarithm.

    Args:
        strength: λ; 0 is FedAvg.
        on: What o is.
        reduce: Whether each example has its logarithm or the batch has one.
    """

    reads: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(
        self,
        strength: float = 0.03,
        on: Literal["logits", "softmax"] = "logits",
        reduce: Literal["sample", "batch"] = "sample",
    ) -> None:
        self._strength, self._on, self._reduce = strength, on, reduce

    def penalty(self, seen: Seen) -> Tensor | None:
        """Return the penalty of each client, shape (m,), of its logits, which need not be built."""
        valid = seen.valid
        squares = self._squares(seen.outputs, valid)
        if self._reduce == "sample":
            return self._strength * _mean(squares.log1p(), valid)
        return self._strength * torch.where(valid, squares, 0).flatten(1).sum(1).log1p()

    def _squares(self, outputs: Outputs, valid: Tensor) -> Tensor:
        """Return the sums of squares (m, B, …) of logits, or of softmax outputs."""
        if outputs.head is None:
            values = outputs.logits if self._on == "logits" else outputs.logits.softmax(-1)
            return values.square().sum(-1)
        rows = rows_of(outputs, torch.where(valid, 0, IGNORE_INDEX))
        if self._on == "logits":
            return rows(SumOfSquares())[0]
        # Σ p² = Σ e^{2z} / (Σ e^z)²
        half, whole = rows(LogSumExp(0.5), LogSumExp())
        return (2 * half - 2 * whole).exp()


class Guided(LocalRule):
    """FedLEx's guided steps (Internò et al. 2024): each step, or gradient, times the guidance G.

    On gradients it means nothing to Adam, which divides a constant factor out again.

    Args:
        guidance: G.
        on: ``update``, after the optimiser with its weight decay, or ``gradient``, before it.
    """

    def __init__(self, guidance: Member, on: Literal["update", "gradient"] = "update") -> None:
        self._guidance, self._on = guidance, on

    def gradient(self, name: str, gradient: Tensor, param: Tensor) -> Tensor:
        """Return the gradient (m, …) times the guidance, with ``on="gradient"``."""
        del param
        return gradient * self._guidance[name] if self._on == "gradient" else gradient

    def update(self, name: str, step: Tensor) -> Tensor:
        """Return the step (m, …) times the guidance, with ``on="update"``."""
        return step * self._guidance[name] if self._on == "update" else step


def _only(stack: Stack, place: int) -> Stack:
    """Return what one client has, (1, …), of a stack (M, …)."""
    return {name: value[place : place + 1] for name, value in stack.items()}


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of values (m, B, …) over the valid ones, (m,); 0 where there are none."""
    counted = valid.flatten(1).sum(1).clamp(min=1)
    return torch.where(valid, values, 0).flatten(1).sum(1) / counted


def _over(numbers: Tensor, like: Tensor) -> Tensor:
    """Return numbers (M,) so that they divide a stack (M, …)."""
    return numbers.to(like).reshape(-1, *[1] * (like.dim() - 1))
