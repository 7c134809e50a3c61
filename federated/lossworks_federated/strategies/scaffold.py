"""SCAFFOLD (Karimireddy et al. 2020)."""

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.cohort import LocalRule, Member, Stack
from lossworks.errors import UserError
from lossworks_federated.client.local_rules import ControlVariates
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import Federated, Reproducible, equal_weights, moved
from lossworks_federated.strategies.parts import Cohort, Part, PartOutcome


class ControlPart(Part):
    """Corrects each step by c − c_i; a client keeps c_i and sends its change, the server keeps c.

    c_i⁺ counts the steps really taken at the clients' learning rate, so clients must take plain SGD steps.
    Under FedLEx's guidance it is the mean *guided* gradient, since that is what the steps followed.
    """

    slug = "scaffold"
    exchanges = True
    sends = True
    keeps = True
    plain_sgd = True
    _c: Member | None = None

    def initial(self, origin: Member) -> Member:
        """Return the first control variate of each client, c_i = 0."""
        return zeros(origin)

    def rule(self, cohort: Cohort) -> LocalRule:
        """Return the correction."""
        return ControlVariates(cohort.received, cohort.placed(cohort.kept))

    def finish(self, cohort: Cohort, ended: Stack, steps: Tensor) -> PartOutcome:
        """Return c_i⁺ to keep and c_i⁺ − c_i to send."""
        if cohort.local.optimizer != "sgd" or cohort.local.momentum:
            raise UserError("scaffold needs local.optimizer=sgd and local.momentum=0: c_i is a mean gradient")
        new = ControlVariates.renewed(
            cohort.kept, cohort.received, cohort.origin, ended, steps, cohort.local.lr
        )
        return PartOutcome(new, {name: value - cohort.kept[name] for name, value in new.items()})

    def to_clients(self, origin: Member) -> Member:
        """Return c, 0 at first."""
        if self._c is None:
            self._c = zeros(origin)
        return self._c

    def absorb(self, sent: Stack, updates: Stack, clients: int) -> None:
        """Add Σ (c_i⁺ − c_i)/M to c, M all clients."""
        del updates
        c = self._c or {}
        self._c = {name: c[name] + change.sum(0) / clients for name, change in sent.items()}

    def state(self) -> Member:
        """Return the server's control variate c."""
        return self._c or {}

    def restore(self, state: Member) -> None:
        """Set the server's control variate c."""
        self._c = state or None


class Scaffold(Federated, Reproducible):
    """Steps corrected by control variates; w ← w⁰ + η_g/m · Σ (w_i − w⁰), all clients alike."""

    slug = "scaffold"
    formula = "w = w⁰ + (η_g/m) Σ g_i with ∇F_i(w) - c_i + c in clients"
    paper = Paper(
        "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", "Karimireddy et al.", 2020
    )
    part = ControlPart

    server_lr: float = number(1.0, "η_g, factor of the mean update", gt=0, le=10, search=(0.1, 2), log=True)

    def combine(self, received: Received) -> Member:
        """Return w⁰ + η_g times the plain mean of updates."""
        return moved(self.origin, received.updates, equal_weights(received) * self.server_lr)


def zeros(like: Member) -> Member:
    """Return zeros of the same names and shapes."""
    return {name: torch.zeros_like(value) for name, value in like.items()}
