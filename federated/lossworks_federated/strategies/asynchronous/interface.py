"""What strategies that take in replies one by one have in common."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from lossworks.catalogue.declaration import integer
from lossworks.cohort import Member
from lossworks.errors import RunError
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import Federated


@dataclass(frozen=True, eq=False)
class Arrived:
    """A reply that has arrived.

    Attributes:
        origin: The parameters that its client started from.
        update: g, where it ended minus where it started.
        staleness: τ, how many versions of the global model have been made since.
    """

    origin: Member
    update: Member
    staleness: int


class Asynchronous(Federated):
    """A strategy without rounds: ``concurrency`` clients are always under way.

    A client whose reply has arrived is idle, and another idle one, drawn anew, starts from the newest model.
    What is called a round is as many replies as a round of other strategies asks clients.
    """

    asynchronous = True

    concurrency: int = integer(
        0, "clients under way at a time; 0 for as many as other strategies ask in a round", ge=0, le=10**6
    )

    nodes: Any
    content: Any
    places: Any

    @abstractmethod
    def taken_in(self, model: Member, arrived: Arrived) -> Member | None:
        """Return the next global model, or None if this reply alone does not change it."""

    def combine(self, received: Received) -> Member:
        """Refuse to aggregate a whole round.

        Raises:
            RunError: Always.
        """
        del received
        raise RunError(f"{self.slug} takes in replies as they arrive; only `lossworks federate` runs it")
