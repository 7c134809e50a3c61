"""A strategy of another package."""

from lossworks.catalogue.declaration import Paper, number
from lossworks.cohort import Member
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import Federated, Reproducible, moved


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
