"""FedDyn (Acar et al. 2021)."""

from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.cohort import LocalRule, Member, Stack
from lossworks_federated.client.local_rules import Dynamic
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import Federated, Reproducible, equal_weights, moved
from lossworks_federated.strategies.parts import Cohort, Part, PartOutcome
from lossworks_federated.strategies.scaffold import zeros


class DynamicPart(Part):
    """The penalty (α/2)‖w − w⁰‖² − ⟨h_i, w⟩; a client keeps h_i."""

    slug = "feddyn"
    keeps = True

    def initial(self, origin: Member) -> Member:
        """Return the first correction of each client, h_i = 0."""
        return zeros(origin)

    def rule(self, cohort: Cohort) -> LocalRule:
        """Return the penalty's gradient."""
        return Dynamic(cohort.origin, cohort.placed(cohort.kept), self.settings.alpha)

    def finish(self, cohort: Cohort, ended: Stack, steps: Tensor) -> PartOutcome:
        """Return h_i − α(w − w⁰), to keep."""
        del steps
        return PartOutcome(kept=Dynamic.renewed(cohort.kept, cohort.origin, ended, self.settings.alpha))


class FedDyn(Federated, Reproducible):
    """Dynamic penalties in clients; h ← h − (α/M) Σ (w_i − w⁰) and w ← mean w_i − h/α, all clients alike."""

    slug = "feddyn"
    formula = "h ← h - (α/M) Σ g_i, w = mean w_i - h/α"
    paper = Paper("Federated Learning Based on Dynamic Regularization", "Acar et al.", 2021)
    part = DynamicPart
    whole_updates = True

    alpha: float = number(0.1, "α of the dynamic penalty", gt=0, le=10, search=(1e-3, 1), log=True)

    _h: Member | None = None

    def combine(self, received: Received) -> Member:
        """Return the mean of the clients' parameters minus h/α."""
        alpha, h = self.alpha, self._h or zeros(self.origin)
        self._h = {
            name: h[name] - alpha / self.clients * update.sum(0) for name, update in received.updates.items()
        }
        mean = moved(self.origin, received.updates, equal_weights(received))
        return {name: value - self._h[name] / alpha for name, value in mean.items()}

    def server_state(self) -> Member:
        """Return the server's correction h."""
        return self._h or {}

    def restore_server(self, state: Member) -> None:
        """Set the server's correction h."""
        self._h = state or None
