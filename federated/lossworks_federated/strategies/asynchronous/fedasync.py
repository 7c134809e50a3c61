"""FedAsync (Xie, Koyejo, Gupta 2019)."""

from lossworks.catalogue.declaration import Paper, choice, number
from lossworks.cohort import Member
from lossworks_federated.strategies.asynchronous.interface import Arrived, Asynchronous
from lossworks_federated.strategies.interface import Reproducible


class FedAsync(Asynchronous, Reproducible):
    """Mixes each client's parameters into the model as they arrive, stale ones less.

    w ← (1 − α_t) w + α_t w_i with α_t = α·s(τ) and τ the staleness: s = 1 (constant), (τ + 1)^(−a)
    (polynomial), or 1 up to τ = b and 1/(a'(τ − b) + 1) above (hinge). The pull of its clients towards the
    model that they started from is that of fedprox: ``also: [{name: fedprox, mu: 0.005}]``.
    """

    slug = "fedasync"
    formula = "w ← (1-α s(τ)) w + α s(τ) w_i for each reply, τ versions old"
    paper = Paper("Asynchronous Federated Optimization", "Xie, Koyejo, Gupta", 2019, "algorithm 1")

    alpha: float = number(
        0.6,
        "α, share of a fresh client's parameters; 1 replaces the model by them",
        gt=0,
        le=1,
        search=(0.05, 1),
    )
    staleness: str = choice(
        "polynomial",
        "s, how the share falls with staleness",
        ("constant", "polynomial", "hinge"),
    )
    exponent: float = number(0.5, "a of polynomial; 0 is constant", ge=0, le=10, search=(0, 2))
    slope: float = number(10.0, "a' of hinge", gt=0, le=1e3, search=(0.5, 20), log=True)
    free: float = number(4.0, "b of hinge, staleness up to which nothing is taken off", ge=0, le=1e6)

    def share(self, staleness: int) -> float:
        """Return α_t of a reply."""
        if self.staleness == "polynomial":
            return float(self.alpha * (staleness + 1) ** -self.exponent)
        if self.staleness == "hinge" and staleness > self.free:
            return float(self.alpha / (self.slope * (staleness - self.free) + 1))
        return float(self.alpha)

    def taken_in(self, model: Member, arrived: Arrived) -> Member:
        """Return the mixture."""
        share = self.share(arrived.staleness)
        return {
            name: (1 - share) * value + share * (arrived.origin[name] + arrived.update[name])
            for name, value in model.items()
        }
