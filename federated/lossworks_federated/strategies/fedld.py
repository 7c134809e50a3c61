"""FedLD (Zeng, Guo et al. 2024): margin control in clients, principal directions in the server."""

import torch

from lossworks.catalogue.declaration import Paper, choice, number
from lossworks.cohort import LocalRule, Member
from lossworks_federated.client.local_rules import Margin
from lossworks_federated.server.principal_directions import UpdateRescale, principal_update
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import Federated, Reproducible
from lossworks_federated.strategies.parts import Cohort, Part


class MarginPart(Part):
    """Discourages confident outputs."""

    slug = "fedld"
    strength = "margin"

    def rule(self, cohort: Cohort) -> LocalRule:
        """Return the margin control."""
        del cohort
        if self.settings.variant == "paper":
            return Margin(self.settings.margin, on="logits", reduce="sample")
        return Margin(self.settings.margin, on="softmax", reduce="batch")


class FedLD(Federated, Reproducible):
    """Each layer's update along the principal directions of the clients' updates; all clients alike.

    Layers of one entry get the plain mean, and so do, in ``variant=reference``, all layers whose aggregated
    updates were 0 so far, those of the first round among them.
    """

    slug = "fedld"
    formula = (
        "w = w⁰ + Σ_j≤ρm (s_j/Σs) u_j mean ‖g_i‖ sign(e_ij), from G Gᵀ/m = Σ s_j e_j e_jᵀ and u_j ∝ Gᵀe_j; "
        "F_i + λ log(1 + ‖z‖²) in clients"
    )
    paper = Paper(
        "Tackling Data Heterogeneity in Federated Learning via Loss Decomposition", "Zeng, Guo et al.", 2024
    )
    part = MarginPart
    whole_updates = True

    margin: float = number(
        0.03,
        "λ of the margin control; 0 for none, and 0.1 in the published command",
        ge=0,
        le=10,
        search=(3e-3, 0.3),
        log=True,
    )
    rho: float = number(0.8, "ρ, share of the principal directions that is kept", gt=0, le=1, search=(0.5, 1))
    variant: str = choice(
        "paper",
        "paper: the margin is on logits, by example, and every update is along principal directions; "
        "reference: as the released code, on softmax outputs of the whole batch, and a layer's first update "
        "is the mean",
        ("paper", "reference"),
    )
    rescale: UpdateRescale = choice(
        "none",
        "norm gives a layer's update the norm of the mean update (not in the paper)",
        ("none", "norm"),
    )

    _history: Member | None = None

    def combine(self, received: Received) -> Member:
        """Return w⁰ plus the principal updates."""
        history = self._history or {}
        combined = {}
        for name, updates in received.updates.items():
            first = self.variant == "reference" and not history.get(name, torch.zeros(1)).any()
            if updates[0].numel() == 1 or first:
                update = updates.mean(0)
            else:
                update = principal_update(updates, self.rho, rescale=self.rescale)
            combined[name] = update
        if self.variant == "reference":
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
