"""MOON (Li, He, Song 2021)."""

from pydantic import Field
from torch import Tensor

from lossworks.cohort import LocalRule, Member, Stack
from lossworks.specs import Spec
from lossworks_federated.client.local_rules import Contrast
from lossworks_federated.strategies.interface import Federated, Reproducible
from lossworks_federated.strategies.parts import Cohort, Outcome, Part


class MoonSettings(Spec):
    """Hyperparameters of MOON."""

    mu: float = Field(1.0, ge=0.0, le=1e3, description="μ, weight of the contrast; 0 is FedAvg")
    temperature: float = Field(0.5, gt=0.0, le=10.0, description="T of the contrast")


class ContrastPart(Part):
    """Contrasts features with the global model's and with the client's own of its last round."""

    slug = "moon"
    keeps = True
    settings: MoonSettings

    def initial(self, origin: Member) -> Member:
        """Return w⁰: a client's first round has no earlier model."""
        return origin

    def rule(self, cohort: Cohort) -> LocalRule:
        """Return the contrast."""
        settings = self.settings
        return Contrast(
            cohort.model, cohort.origin, cohort.placed(cohort.kept), settings.mu, settings.temperature
        )

    def finish(self, cohort: Cohort, ended: Stack, steps: Tensor) -> Outcome:
        """Return where the client ended, to keep."""
        del cohort, steps
        return Outcome(kept=ended)


class Moon(Federated, Reproducible):
    """FedAvg with model-contrastive local training; features are those the head reads, unprojected."""

    slug = "moon"
    paper = "Li, He, Song 2021, Model-Contrastive Federated Learning"
    Settings = MoonSettings
    part = ContrastPart
    averages = True
