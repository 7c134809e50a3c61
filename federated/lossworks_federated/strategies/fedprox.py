"""FedProx (Li et al. 2020)."""

from lossworks.catalogue.declaration import Paper, number
from lossworks.cohort import LocalRule
from lossworks_federated.client.local_rules import Proximal
from lossworks_federated.strategies.interface import Federated, Reproducible
from lossworks_federated.strategies.parts import Cohort, Part


class ProximalPart(Part):
    """Pulls clients towards w⁰."""

    slug = "fedprox"
    strength = "mu"

    def rule(self, cohort: Cohort) -> LocalRule:
        """Return the pull."""
        return Proximal(cohort.origin, self.settings.mu)


class FedProx(Federated, Reproducible):
    """FedAvg whose clients have the penalty (μ/2)‖w − w⁰‖²."""

    slug = "fedprox"
    formula = "w = Σ p_i w_i with ∇F_i(w) + μ (w - w⁰) in clients"
    paper = Paper("Federated Optimization in Heterogeneous Networks", "Li et al.", 2020)
    part = ProximalPart
    averages = True

    mu: float = number(
        0.1, "μ of the penalty (μ/2)‖w - w⁰‖²; 0 is FedAvg", ge=0, le=1e4, search=(1e-3, 1), log=True
    )
