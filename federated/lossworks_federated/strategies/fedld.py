"""FedLD (Zeng, Guo et al. 2024): margin control in clients, principal directions in the server."""

from typing import Literal

import torch
from pydantic import Field

from lossworks.cohort import LocalRule, Member
from lossworks.specs import Spec
from lossworks_federated.client.local_rules import Margin
from lossworks_federated.server.principal_directions import principal_update
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import Federated, Reproducible
from lossworks_federated.strategies.parts import Cohort, Part


class FedLDSettings(Spec):
    """Hyperparameters of FedLD; the published command has margin 0.1."""

    margin: float = Field(0.03, ge=0.0, le=10.0, description="λ of the margin control; 0 for none")
    rho: float = Field(0.8, gt=0.0, le=1.0, description="ρ, share of the principal directions that is kept")
    variant: Literal["paper", "reference"] = Field(
        "paper",
        description="paper: the margin is on logits, by example, and every update is along principal "
        "directions; reference: as the released code, on softmax outputs of the whole batch, and a layer's "
        "first update is the mean",
    )
    rescale: Literal["none", "norm"] = Field(
        "none", description="norm gives a layer's update the norm of the mean update (not in the paper)"
    )


class MarginPart(Part):
    """Discourages confident outputs."""

    slug = "fedld"
    settings: FedLDSettings

    def rule(self, cohort: Cohort) -> LocalRule | None:
        """Return the margin control."""
        del cohort
        if not self.settings.margin:
            return None
        if self.settings.variant == "paper":
            return Margin(self.settings.margin, on="logits", reduce="sample")
        return Margin(self.settings.margin, on="softmax", reduce="batch")


class FedLD(Federated, Reproducible):
    """Each layer's update along the principal directions of the clients' updates; all clients alike.

    Layers of one entry get the plain mean, and so do, in ``variant=reference``, all layers whose aggregated
    updates were 0 so far, those of the first round among them.
    """

    slug = "fedld"
    paper = "Zeng, Guo et al. 2024, Tackling Data Heterogeneity in Federated Learning via Loss Decomposition"
    Settings = FedLDSettings
    part = MarginPart
    settings: FedLDSettings
    _history: Member | None = None

    def combine(self, received: Received) -> Member:
        """Return w⁰ plus the principal updates."""
        settings, history = self.settings, self._history or {}
        combined = {}
        for name, updates in received.updates.items():
            first = settings.variant == "reference" and not history.get(name, torch.zeros(1)).any()
            if updates[0].numel() == 1 or first:
                update = updates.mean(0)
            else:
                update = principal_update(updates, settings.rho, rescale=settings.rescale)
            combined[name] = update
        if settings.variant == "reference":
            # Of the code's running average only one thing is ever asked: whether it is all zero.
            self._history = {
                name: torch.maximum(history.get(name, torch.zeros(1)), update.any().float().reshape(1))
                for name, update in combined.items()
            }
        return {name: self.origin[name] + update for name, update in combined.items()}

    def server_state(self) -> Member:
        """Return which layers have moved."""
        return self._history or {}

    def restore_server(self, state: Member) -> None:
        """Set which layers have moved."""
        self._history = state or None
