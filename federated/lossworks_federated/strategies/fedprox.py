"""FedProx (Li et al. 2020)."""

from pydantic import Field

from lossworks.cohort import LocalRule
from lossworks.specs import Spec
from lossworks_federated.client.local_rules import Proximal
from lossworks_federated.strategies.interface import Federated, Reproducible
from lossworks_federated.strategies.parts import Cohort, Part


class ProximalSettings(Spec):
    """Hyperparameters of FedProx."""

    mu: float = Field(0.1, ge=0.0, le=1e4, description="μ of the penalty (μ/2)‖w − w⁰‖²; 0 is FedAvg")


class ProximalPart(Part):
    """Pulls clients towards w⁰."""

    slug = "fedprox"
    settings: ProximalSettings

    def rule(self, cohort: Cohort) -> LocalRule:
        """Return the pull."""
        return Proximal(cohort.origin, self.settings.mu)


class FedProx(Federated, Reproducible):
    """FedAvg whose clients have the penalty (μ/2)‖w − w⁰‖²."""

    slug = "fedprox"
    paper = "Li et al. 2020, Federated Optimization in Heterogeneous Networks"
    Settings = ProximalSettings
    part = ProximalPart
    averages = True
