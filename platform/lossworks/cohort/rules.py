"""What a member does besides descending on its loss: the hooks of local training."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lossworks.data.batch import IGNORE_INDEX
from lossworks.models.interface import Outputs


@dataclass(frozen=True, eq=False)
class Seen:
    """What members make of their batches at one step; m of them are looked at together.

    Attributes:
        inputs: Shape (m, B, …).
        outputs: Features (m, B, …, D), with logits (m, B, …, K), or with the head of the only member.
        targets: Shape (m, B, …): classes, of which -100 counts for nothing, or numbers, of which NaN does.
    """

    inputs: Tensor
    outputs: Outputs
    targets: Tensor

    @property
    def valid(self) -> Tensor:
        """Which elements count, bool, shaped like the targets."""
        if self.targets.is_floating_point():
            return ~self.targets.isnan()
        return self.targets != IGNORE_INDEX


class LocalRule:
    """Hooks of a local step; the defaults leave it as it is.

    A method overrides those it needs. Gradients and steps have the members first, and hold the first m of
    them that are still at work, so a hook takes the front part of what it keeps.

    Attributes:
        reads: What ``penalty`` reads of ``inputs``, ``features`` and ``logits``, for callers that would make
            the others in vain.
    """

    reads: ClassVar[tuple[str, ...]] = ("inputs", "features", "logits")

    def of(self, place: int) -> "LocalRule":
        """Return the rule of one member alone, which has the first axis to itself.

        A method whose hooks keep something of each member overrides it.

        Args:
            place: Of the member, in the order of the batches.
        """
        del place
        return self

    def penalty(self, seen: Seen) -> Tensor | None:
        """Return what is added to each member's loss, shape (m,), or None; a function of its outputs.

        Args:
            seen: The members' batches and outputs.
        """
        del seen
        return None

    def gradient(self, name: str, gradient: Tensor, param: Tensor) -> Tensor:
        """Return the gradient (m, …) that the optimiser is given for a parameter (m, …)."""
        del name, param
        return gradient

    def update(self, name: str, step: Tensor) -> Tensor:
        """Return what is added to a parameter in place of the optimiser's ``step`` (m, …)."""
        del name
        return step
