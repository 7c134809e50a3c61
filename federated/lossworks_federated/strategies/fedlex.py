"""FedLEx (Internò, Olhofer, Jin, Hammer 2024): clients explore, and what moved little moves little later."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lossworks.catalogue.declaration import Paper, choice, integer, number
from lossworks.cohort import LocalRule, Member, Stack
from lossworks_federated.client.local_rules import Guided
from lossworks_federated.server.guidance import guidance_matrix
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import Federated, Reproducible
from lossworks_federated.strategies.parts import Cohort, Part


class GuidedPart(Part):
    """Multiplies steps by the guidance; the server keeps how far each explorer moved."""

    slug = "fedlex"
    exchanges = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self._displacements: Stack | None = None  # w⁰ − w_i of the explorers
        self._explorers: list[int] = []
        self._guidance: Member = {}

    def rule(self, cohort: Cohort) -> LocalRule | None:
        """Return the guidance, if the server sent one."""
        if not cohort.received:
            return None
        return Guided(cohort.received, on="update" if self.settings.variant == "paper" else "gradient")

    def before(self, chosen: Sequence[int], explore: Callable[[float, int], Received]) -> None:
        """Explore before the first round, and make the guidance."""
        if self._displacements is None:
            found = explore(self.settings.explorers, self.settings.explore_epochs)
            self._explorers = list(found.partitions)
            self._displacements = {name: -update for name, update in found.updates.items()}
            self._make(range(len(self._explorers)))
        elif self.settings.refresh == "each-round":
            self._make([row for row, client in enumerate(self._explorers) if client in set(chosen)])

    def to_clients(self, origin: Member) -> Member:
        """Return the guidance; none if no explorer came back, which is FedAvg."""
        del origin
        return self._guidance

    def state(self) -> Member:
        """Return where the explorers went and the guidance."""
        if self._displacements is None:
            return {}
        kept = {f"moved.{name}": value for name, value in self._displacements.items()}
        guidance = {f"guidance.{name}": value for name, value in self._guidance.items()}
        return {**kept, **guidance, "explorers": torch.tensor(self._explorers, dtype=torch.int64)}

    def restore(self, state: Member) -> None:
        """Set them."""
        if state:
            self._explorers = [int(one) for one in state["explorers"]]
            self._displacements = _beginning(state, "moved.")
            self._guidance = _beginning(state, "guidance.")

    def _make(self, rows: Sequence[int]) -> None:
        settings = self.settings
        self._guidance = {
            name: guidance_matrix(
                value[list(rows)], order=settings.variant, scaler=settings.scaler, rescale=settings.rescale
            )
            for name, value in (self._displacements or {}).items()
        }


class FedLEx(Federated, Reproducible):
    """FedAvg whose clients' steps are multiplied by the guidance of an exploration.

    Explorers stop after ``explore_epochs``; the early stopping of the paper is left out. The guidance goes to
    clients with every round's model.
    """

    slug = "fedlex"
    formula = "w = Σ p_i w_i with steps multiplied by a guidance in [0, 1] in clients"
    paper = Paper(
        "Federated Loss Exploration for Improved Convergence on Non-IID Data",
        "Internò, Olhofer, Jin, Hammer",
        2024,
    )
    part = GuidedPart

    explore_epochs: int = integer(
        5,
        "E_x, epochs of the exploration; the released code explores for 150 with all clients",
        ge=1,
        le=1000,
        search=(1, 50),
        log=True,
    )
    explorers: float = number(1.0, "share of the clients that explore", gt=0, le=1)
    variant: str = choice(
        "paper",
        "paper: each client's matrix is scaled, then averaged, and steps are multiplied; reference: as in "
        "the released code, averaged, then scaled, and gradients are multiplied",
        ("paper", "reference"),
    )
    scaler: str = choice("minmax", "how a matrix is brought to [0, 1]", ("minmax", "robust"))
    refresh: str = choice(
        "once",
        "each-round builds the guidance from the matrices of a round's clients",
        ("once", "each-round"),
    )
    rescale: str = choice(
        "none",
        "mean divides a matrix by its mean, so that steps stay as long (not in the paper)",
        ("none", "mean"),
    )


def _beginning(state: Member, prefix: str) -> Member:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
