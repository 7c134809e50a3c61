"""Small random problems for the audit and the tests; each kind of loss makes its own of them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lossworks.data.batch import IGNORE_INDEX

CLASSES = 7
_LENGTH = 3
_MAP_CLASSES, _MAP = 3, (5, 6)


@dataclass(frozen=True, eq=False)
class Problem:
    """What a loss is called with; the first axis of everything is rows, which can be split.

    Attributes:
        prediction: Float64.
        target: What goes with it.
        context: Further inputs by name.
    """

    prediction: Tensor
    target: Tensor
    context: dict[str, Tensor] = field(default_factory=dict)

    def part(self, rows: slice) -> "Problem":
        """Return some rows."""
        context = {name: value[rows] for name, value in self.context.items()}
        return Problem(self.prediction[rows], self.target[rows], context)

    def with_prediction(self, prediction: Tensor) -> "Problem":
        """Return the same with other predictions."""
        return Problem(prediction, self.target, self.context)

    def given(self, **context: Tensor) -> "Problem":
        """Return the same with further inputs."""
        return Problem(self.prediction, self.target, {**self.context, **context})


def of_classes(rows: int, generator: torch.Generator) -> Problem:
    """Return logits (rows, 7) and a class each."""
    logits = torch.randn(rows, CLASSES, dtype=torch.float64, generator=generator)
    return Problem(logits, torch.randint(0, CLASSES, (rows,), generator=generator))


def of_sequences(rows: int, generator: torch.Generator) -> Problem:
    """Return logits (rows, 3, 7) and a class for each of three positions."""
    logits = torch.randn(rows, _LENGTH, CLASSES, dtype=torch.float64, generator=generator)
    return Problem(logits, torch.randint(0, CLASSES, (rows, _LENGTH), generator=generator))


def of_candidates(rows: int, candidates: int, generator: torch.Generator) -> Problem:
    """Return logits (rows, candidates, 3, 7) and a class for each of three positions."""
    shape = (rows, candidates, _LENGTH)
    logits = torch.randn(*shape, CLASSES, dtype=torch.float64, generator=generator)
    return Problem(logits, torch.randint(0, CLASSES, shape, generator=generator))


def of_maps(rows: int, generator: torch.Generator) -> Problem:
    """Return logits (rows, 3, 5, 6), and a class for each pixel but for one that is ignored."""
    logits = torch.randn(rows, _MAP_CLASSES, *_MAP, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, _MAP_CLASSES, (rows, *_MAP), generator=generator)
    targets[:, 1, 2] = IGNORE_INDEX
    return Problem(logits, targets)


def steps(targets: Tensor) -> Tensor:
    """Return two steps in every sequence of targets (B, T), numbered over the batch."""
    second = (torch.arange(targets.shape[1]) * 2 >= targets.shape[1]).long()
    return 2 * torch.arange(len(targets))[:, None] + second
