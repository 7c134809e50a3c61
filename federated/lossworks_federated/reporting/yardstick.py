"""The figure in which a federation's strategies and clients are compared."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from lossworks.tasks.interface import Mode
from lossworks.tasks.registry import task_class
from lossworks_federated.specs import FederationSpec


@dataclass(frozen=True)
class Yardstick:
    """A figure, such as accuracy or bits per byte.

    Attributes:
        name: Behind ``server/`` in the journal, and as clients report it.
        best: Which values are better.
    """

    name: str = "accuracy"
    best: Mode = "max"

    @classmethod
    def of(cls, spec: FederationSpec) -> Self:
        """Return the task's; of an app of another package, accuracy."""
        if spec.app is not None:
            return cls()
        kind = task_class(spec.task)
        tracked = kind.compared_by()
        return cls(tracked.removeprefix("eval/"), kind.yardsticks[tracked])

    @property
    def words(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ")

    @property
    def curve(self) -> str:
        """Its name in journals, on held-out data."""
        return f"server/{self.name}"

    @property
    def sign(self) -> float:
        """1 where larger values are better, and −1 where smaller ones are."""
        return 1.0 if self.best == "max" else -1.0

    def reached(self, values: np.ndarray, target: float) -> np.ndarray:
        """Return which values are as good as a target, or better, bool."""
        return self.sign * values >= self.sign * target
