"""MOON (Li, He, Song 2021)."""

from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.cohort import LocalRule, Member, Stack
from lossworks_federated.client.local_rules import Contrast
from lossworks_federated.strategies.interface import Federated, Reproducible
from lossworks_federated.strategies.parts import Cohort, Part, PartOutcome


class ContrastPart(Part):
    """Contrasts features with the global model's and with the client's own of its last round."""

    slug = "moon"
    keeps = True
    strength = "mu"

    def initial(self, origin: Member) -> Member:
        """Return w⁰: a client's first round has no earlier model."""
        return origin

    def rule(self, cohort: Cohort) -> LocalRule:
        """Return the contrast."""
        settings = self.settings
        return Contrast(
            cohort.features, cohort.origin, cohort.placed(cohort.kept), settings.mu, settings.temperature
        )

    def finish(self, cohort: Cohort, ended: Stack, steps: Tensor) -> PartOutcome:
        """Return where the client ended, to keep."""
        del cohort, steps
        return PartOutcome(kept=ended)


class Moon(Federated, Reproducible):
    """FedAvg with model-contrastive local training; features are those the head reads, unprojected."""

    slug = "moon"
    formula = (
        "w = Σ p_i w_i with F_i - μ log(e^(cos(h, h⁰)/T)/(e^(cos(h, h⁰)/T) + e^(cos(h, h_i)/T))) in clients"
    )
    paper = Paper("Model-Contrastive Federated Learning", "Li, He, Song", 2021)
    part = ContrastPart
    averages = True

    mu: float = number(
        1.0, "μ, weight of the contrast; 0 is FedAvg", ge=0, le=1e3, search=(0.1, 10), log=True
    )
    temperature: float = number(0.5, "T of the contrast", gt=0, le=10, search=(0.1, 1), log=True)
