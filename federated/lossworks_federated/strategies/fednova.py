"""FedNova (Wang et al. 2020)."""

import torch

from lossworks.catalogue.declaration import Paper
from lossworks.cohort import Member
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import Federated, Reproducible, moved


class FedNova(Federated, Reproducible):
    """Updates per local step: w ← w⁰ + τ Σ p_i g_i/a_i with τ = Σ p_i a_i.

    a_i is the sum of the factors with which gradients enter a client's update: its number of steps for SGD,
    [K − r(1 − r^K)/(1 − r)]/(1 − r) with momentum r, [1 − (1 − ημ)^K]/(ημ) with FedProx's pull μ; clients
    report it. With equal steps it is FedAvg.
    """

    slug = "fednova"
    formula = "w = w⁰ + τ Σ p_i g_i/a_i with τ = Σ p_i a_i"
    paper = Paper(
        "Tackling the Objective Inconsistency Problem in Federated Optimization", "Wang et al.", 2020
    )
    reports = ("step-weight",)

    def combine(self, received: Received) -> Member:
        """Return w⁰ plus the normalised updates."""
        p = received.examples / received.examples.sum()
        a = received.column("step-weight")
        if not torch.all(a > 0):
            return moved(self.origin, received.updates, p)
        return moved(self.origin, received.updates, (p * a).sum() * p / a)
