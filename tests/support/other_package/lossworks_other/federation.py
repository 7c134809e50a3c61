"""Strategies of another package, one with a part in clients."""

from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.cohort import LocalRule, Member
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import Federated, Reproducible, moved
from lossworks_federated.strategies.parts import Cohort, Part


class FedSlow(Federated, Reproducible):
    """A share of the mean update, weighted by examples."""

    slug = "fedslow"
    formula = "w = w⁰ + η Σ p_i g_i"
    paper = Paper(
        "Adaptive Federated Optimization", "Reddi et al.", 2021, "algorithm 1, of SGD in the server"
    )

    eta: float = number(0.5, "η, the share; 1 is FedAvg", gt=0, le=1, search=(0.1, 1))

    def combine(self, received: Received) -> Member:
        return moved(self.origin, received.updates, self.eta * received.examples / received.examples.sum())


class _Shrink(LocalRule):
    """The gradient of (λ/2)‖w‖²."""

    def __init__(self, strength: float) -> None:
        self._strength = strength

    def gradient(self, name: str, gradient: Tensor, param: Tensor) -> Tensor:
        del name
        return gradient + self._strength * param


class ShrinkPart(Part):
    """Pulls clients towards zero."""

    slug = "fedshrink"

    def rule(self, cohort: Cohort) -> LocalRule:
        del cohort
        return _Shrink(self.settings.strength)


class FedShrink(Federated, Reproducible):
    """FedAvg whose clients have a quadratic penalty."""

    slug = "fedshrink"
    formula = "w = Σ p_i w_i with ∇F_i(w) + λ w in clients"
    paper = Paper("A Simple Weight Decay Can Improve Generalization", "Krogh, Hertz", 1991)
    part = ShrinkPart
    averages = True

    strength: float = number(0.1, "λ of the penalty; 0 is FedAvg", ge=0, le=10, search=(1e-3, 1), log=True)
