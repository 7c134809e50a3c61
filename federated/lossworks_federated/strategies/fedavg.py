"""FedAvg (McMahan et al. 2017), with which all else is compared."""

from lossworks.catalogue.declaration import Paper
from lossworks_federated.strategies.interface import Federated, Reproducible


class FedAvg(Federated, Reproducible):
    """Mean of the clients' parameters, weighted by their examples: w = Σ p_i w_i."""

    slug = "fedavg"
    formula = "w = Σ p_i w_i"
    paper = Paper(
        "Communication-Efficient Learning of Deep Networks from Decentralized Data", "McMahan et al.", 2017
    )
    averages = True
