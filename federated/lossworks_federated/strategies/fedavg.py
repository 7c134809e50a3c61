"""FedAvg (McMahan et al. 2017), and training in one place, with which all else is compared."""

from typing import ClassVar

from lossworks.catalogue.declaration import Paper
from lossworks_federated.strategies.catalogue import POOLED
from lossworks_federated.strategies.interface import Federated, Nodes, Reproducible

_PAPER = Paper(
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", "McMahan et al.", 2017
)


class FedAvg(Federated, Reproducible):
    """Mean of the clients' parameters, weighted by their examples: w = Σ p_i w_i."""

    slug = "fedavg"
    formula = "w = Σ p_i w_i"
    paper = _PAPER
    averages = True


class Centralised(Federated, Reproducible):
    """One client trains on the examples of all, and all test what it returns.

    A round takes as many passes over the examples as clients take in a federation. It shows what is lost by
    leaving the examples where they are; no real federation can do it. McMahan et al. compare with it in
    section 3.
    """

    slug = "centralised"
    formula = "one client with the examples of all"
    paper = _PAPER
    flags: ClassVar[tuple[str, ...]] = (POOLED,)

    def drawn(self, nodes: Nodes, count: int | None, server_round: int, purpose: int = 0) -> Nodes:
        """Return the first client for training; see :meth:`Reproducible.drawn` for tests."""
        return super().drawn(nodes, count, server_round, purpose) if purpose else nodes[:1]
