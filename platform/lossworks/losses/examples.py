"""Small random problems of every kind of loss, for the audit and the tests."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Kind

_CLASSES, _LENGTH, _POSITIVES = 7, 3, 3


@dataclass(frozen=True, eq=False)
class Example:
    """What a loss is called with; the first axis of everything is rows, which can be split.

    Attributes:
        prediction: Floating point.
        target: What goes with it.
        context: Further inputs by name.
        ignorable: Whether targets may hold an ``ignore_index``.
    """

    prediction: Tensor
    target: Tensor
    context: dict[str, Tensor] = field(default_factory=dict)
    ignorable: bool = True

    def part(self, rows: slice) -> "Example":
        """Return some rows."""
        context = {name: value[rows] for name, value in self.context.items()}
        return Example(self.prediction[rows], self.target[rows], context, self.ignorable)

    def with_prediction(self, prediction: Tensor) -> "Example":
        """Return the same with other predictions."""
        return Example(prediction, self.target, self.context, self.ignorable)


def make_example(kind: Kind, requires: tuple[str, ...], rows: int, seed: int, outputs: int = 1) -> Example:
    """Return a random problem in float64.

    Args:
        kind: What the loss works on; one of the keys of ``EXAMPLES``.
        requires: Further inputs that it needs.
        rows: Rows, sequences or examples.
        seed: Of the problem.
        outputs: Width of a value head.
    """
    generator = torch.Generator().manual_seed(seed)
    example = _values(rows, generator, outputs) if kind == "value" else EXAMPLES[kind](rows, generator)
    if "segments" in requires:
        example.context["segments"] = _segments(example.target)
    if "next_probabilities" in requires:
        example.context["next_probabilities"] = example.prediction.flip(0).softmax(-1)
    if "discounts" in requires:
        example.context["discounts"] = torch.rand(rows, dtype=torch.float64, generator=generator)
    return example


def _segments(target: Tensor) -> Tensor:
    """Two steps in every sequence, or bags of two rows; numbered over the batch."""
    if target.dim() == 1:
        return torch.arange(len(target)) // 2
    step = (torch.arange(target.shape[1]) * 2 >= target.shape[1]).long()
    return 2 * torch.arange(len(target))[:, None] + step


def _classes(rows: int, generator: torch.Generator) -> Example:
    logits = torch.randn(rows, _CLASSES, dtype=torch.float64, generator=generator)
    return Example(logits, torch.randint(0, _CLASSES, (rows,), generator=generator))


def _sequences(rows: int, generator: torch.Generator) -> Example:
    logits = torch.randn(rows, _LENGTH, _CLASSES, dtype=torch.float64, generator=generator)
    return Example(logits, torch.randint(0, _CLASSES, (rows, _LENGTH), generator=generator))


def _margins(rows: int, generator: torch.Generator) -> Example:
    logits = torch.randn(rows, dtype=torch.float64, generator=generator)
    return Example(logits, torch.randint(0, 2, (rows,), generator=generator))


def _responses(rows: int, generator: torch.Generator) -> Example:
    predictions, responses = torch.randn(2, rows, dtype=torch.float64, generator=generator)
    return Example(predictions, responses, ignorable=False)


def _values(rows: int, generator: torch.Generator, outputs: int = 1) -> Example:
    predictions = torch.randn(rows, outputs, dtype=torch.float64, generator=generator)
    values = 5 * torch.randn(rows, dtype=torch.float64, generator=generator)
    return Example(predictions, values, ignorable=False)


def _sets(rows: int, generator: torch.Generator) -> Example:
    scores = torch.randn(rows, _CLASSES, dtype=torch.float64, generator=generator)
    return Example(scores, torch.randint(0, _CLASSES, (rows, _POSITIVES), generator=generator))


EXAMPLES: dict[str, Callable[[int, torch.Generator], Example]] = {
    "row": _classes,
    "logits": _classes,
    "sequence": _sequences,
    "margin": _margins,
    "value": _values,
    "multi-label": _sets,
    "bag": _responses,
}
