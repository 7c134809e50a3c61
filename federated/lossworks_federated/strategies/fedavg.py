"""FedAvg (McMahan et al. 2017), with which all else is compared."""

from lossworks.specs import Spec
from lossworks_federated.strategies.interface import Federated, Reproducible


class NoSettings(Spec):
    """FedAvg has no hyperparameters besides those of local training."""


class FedAvg(Federated, Reproducible):
    """Mean of the clients' parameters, weighted by their examples: w = Σ p_i w_i."""

    slug = "fedavg"
    paper = "McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data"
    Settings = NoSettings
    averages = True
