"""The client's part of a method: what it does in local steps, keeps between rounds, and sends.

w⁰ are the parameters that a round starts from. Stacks have the clients first, in the order they were given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lossworks.cohort import Batches, LocalRule, Member, Stack
from lossworks_federated.client.local_rules import StackedFeatures
from lossworks_federated.spec_parts import LocalSpec

if TYPE_CHECKING:
    from lossworks_federated.server.screening import Received


@dataclass(frozen=True, eq=False)
class Cohort:
    """Clients about to train.

    Attributes:
        features: Gives the features of other parameters.
        origin: w⁰.
        batches: What each sees.
        local: Their optimiser.
        received: Arrays that the server sent for this part.
        kept: What each client kept for this part, (M, …) by name; what ``Part.initial`` gives if nothing.
    """

    features: StackedFeatures
    origin: Member
    batches: Batches
    local: LocalSpec
    received: Member
    kept: Stack

    def placed(self, stack: Stack) -> Stack:
        """Return a stack in the order of the batches, which is a rule's."""
        return {name: value[self.batches.members] for name, value in stack.items()}


@dataclass(frozen=True, eq=False)
class PartOutcome:
    """What a part makes of clients that have trained.

    Attributes:
        kept: What each keeps for its next round, (M, …) by name.
        sent: What each sends besides its parameters, (M, …) by name.
    """

    kept: Stack = field(default_factory=dict)
    sent: Stack = field(default_factory=dict)


class Part:
    """A method's part in clients; the defaults do nothing.

    One object serves one round's clients, another, in the server, holds what the method keeps there.

    Args:
        settings: The method's hyperparameters, checked and complete.

    Attributes:
        slug: The method's.
        exchanges: Whether other arrays than parameters go to clients or come from them.
        plain_sgd: Whether clients must take steps of SGD without momentum.
        sends: Whether clients send arrays besides their parameters, named and shaped like them.
        keeps: Whether clients keep arrays between rounds.
        strength: The hyperparameter that leaves nothing to do in clients where it is 0; empty if none does.
    """

    slug: ClassVar[str]
    exchanges: ClassVar[bool] = False
    plain_sgd: ClassVar[bool] = False
    sends: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    strength: ClassVar[str] = ""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = SimpleNamespace(**settings)

    @property
    def idle(self) -> bool:
        """Whether it leaves clients as they are, whatever they run."""
        return bool(self.strength) and not getattr(self.settings, self.strength)

    def initial(self, origin: Member) -> Member:
        """Return what a client has kept before its first round."""
        del origin
        return {}

    def start(self, params: Stack, kept: Stack) -> Stack:
        """Return the parameters that clients train and test in place of the global ones."""
        del kept
        return params

    def rule(self, cohort: Cohort) -> LocalRule | None:
        """Return the hooks of local steps."""
        del cohort
        return None

    def finish(self, cohort: Cohort, ended: Stack, steps: Tensor) -> PartOutcome:
        """Return what clients keep and send after ``steps`` (M,) steps that ended at parameters ``ended``."""
        del cohort, ended, steps
        return PartOutcome()

    def returned(self, origin: Member, ended: Stack) -> Stack:
        """Return the parameters that clients send for those they ended with."""
        del origin
        return ended

    def before(self, chosen: Sequence[int], explore: Callable[[float, int], "Received"]) -> None:
        """Do, in the server, what comes before a round.

        Args:
            chosen: Partitions of the clients that will be asked.
            explore: Lets a share of all clients train plainly for so many epochs, and returns their replies.
        """

    def to_clients(self, origin: Member) -> Member:
        """Return, in the server, the arrays that go to clients with the model."""
        del origin
        return {}

    def absorb(self, sent: Stack, updates: Stack, clients: int) -> None:
        """Take in, in the server, what this round's usable replies sent, of ``clients`` in all."""

    def state(self) -> Member:
        """Return what the server keeps."""
        return {}

    def restore(self, state: Member) -> None:
        """Go on with what the server kept."""
