"""FedBuff (Nguyen et al. 2022)."""

import torch

from lossworks.catalogue.declaration import Paper, integer, number
from lossworks.cohort import Member
from lossworks_federated.records import flattened, grouped
from lossworks_federated.strategies.asynchronous.interface import Arrived, Asynchronous
from lossworks_federated.strategies.interface import Reproducible


class FedBuff(Asynchronous, Reproducible):
    """Collects K updates and steps along their mean, in which stale ones weigh less; all clients alike."""

    slug = "fedbuff"
    formula = "w ← w + (η_g/K) Σ g_i/√(1 + τ_i) over K replies, τ_i versions old"
    paper = Paper(
        "Federated Learning with Buffered Asynchronous Aggregation", "Nguyen et al.", 2022, "algorithm 1"
    )

    buffer: int = integer(10, "K, replies that make a step; 1 takes each in at once", ge=1, le=10**6)
    server_lr: float = number(1.0, "η_g, factor of the mean update", gt=0, le=10, search=(0.1, 2), log=True)

    _sum: Member | None = None
    _count = 0

    def taken_in(self, model: Member, arrived: Arrived) -> Member | None:
        """Return the next model if the buffer is full."""
        weight = (1 + arrived.staleness) ** -0.5
        held = self._sum or {name: torch.zeros_like(value) for name, value in model.items()}
        self._sum = {name: value + weight * arrived.update[name] for name, value in held.items()}
        self._count += 1
        if self._count < self.buffer:
            return None
        step = self.server_lr / self.buffer
        new = {name: value + step * self._sum[name] for name, value in model.items()}
        self._sum, self._count = None, 0
        return new

    def server_state(self) -> Member:
        """Return what the buffer holds."""
        return flattened({"sum": self._sum or {}, "count": {"count": torch.tensor(self._count)}})

    def restore_server(self, state: Member) -> None:
        """Fill the buffer again."""
        groups = grouped(state, ["sum", "count"])
        self._sum = groups["sum"] or None
        self._count = int(groups["count"]["count"]) if groups["count"] else 0
