"""What a run trains: its data, its model, and how it is measured."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from lossworks.data import Order, SequenceOrder, TokenizedCorpus
from lossworks.models import Head, HeadedModel, Objective
from lossworks.specs import AnyTrainSpec, ClassifierSpec
from lossworks.training.objective import TrainedObjective, build_objective


class Rows(Protocol):
    """Training data read by row: sequences of a text, or examples."""

    def __len__(self) -> int:
        """Return how many rows there are."""

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of rows (B,), each with B entries."""


@dataclass(frozen=True)
class Evaluation:
    """A model measured on held-out data, over all ranks.

    Attributes:
        loss: Of the training's own objective, a mean over its elements; it chooses the best checkpoint.
        yardsticks: Figures that compare models whatever loss trained them, by tracked name.
        reliability: Of a classifier: examples, confidence and accuracy by bin of confidence.
        collapse: Of a classifier that asks for it: Gram matrices of features and head, by name.
    """

    loss: float
    yardsticks: dict[str, float]
    reliability: dict[str, list[float]] = field(default_factory=dict)
    collapse: dict[str, list[list[float]]] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Return all values under their tracked names."""
        return {"eval/loss": self.loss, **self.yardsticks}


Sums = Callable[[Objective, Rows, np.ndarray], Tensor]
"""Called with what to measure inside the forward, where rows are read, and which: float64 sums (S,)."""


class Task(ABC):
    """One kind of training; a new kind is a class in a file of its own.

    Attributes:
        unit: What throughput is counted in.
        train: What is trained on.
        held_out: What is evaluated on.
        objective: The trained loss.
    """

    unit: ClassVar[str]
    train: Rows
    held_out: Rows

    def __init__(self, spec: AnyTrainSpec) -> None:
        self.objective: TrainedObjective = build_objective(spec.loss)
        self._batch_size, self._seed = spec.batch_size, spec.seed

    def order(self) -> Order:
        """Return the order in which training visits the rows."""
        return SequenceOrder(len(self.train), self._batch_size, self._seed)

    @abstractmethod
    def build_model(self) -> HeadedModel:
        """Return the untrained model."""

    @abstractmethod
    def counts(self, targets: Tensor) -> tuple[float, float]:
        """Return how many units targets hold, and a further count that the metrics need."""

    @abstractmethod
    def train_metrics(self, loss: float, elements: float, units: float, further: float) -> dict[str, float]:
        """Return the metrics of a step from sums over all ranks.

        Args:
            loss: Summed loss.
            elements: How many elements it is a sum over.
            units: First count of all targets.
            further: Second count of all targets.
        """

    @abstractmethod
    def measure(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        """Return sums, float64 (S,), that ``evaluation`` is made of; called inside the model's forward."""

    @abstractmethod
    def evaluation(self, sums: Tensor) -> Evaluation:
        """Return the figures from sums over all micro-batches and ranks."""

    def analysed(self, evaluation: Evaluation, over: Sums) -> Evaluation:
        """Return the evaluation with what needs further passes over data; every rank calls.

        Args:
            evaluation: On held-out data.
            over: Sums what it is given over rows of data and over ranks.
        """
        del over
        return evaluation

    def flops_per_unit(self, model: HeadedModel) -> float | None:
        """Return the floating-point operations of a training step a unit, or None if not known."""
        del model
        return None


def build_task(spec: AnyTrainSpec, corpus: TokenizedCorpus | None) -> Task:
    """Return the task of a spec.

    Args:
        spec: The run.
        corpus: The tokenised text, for language models.

    Raises:
        UserError: The data can't be used.
    """
    if isinstance(spec, ClassifierSpec):
        from lossworks.training.classification import ClassificationTask

        return ClassificationTask(spec)
    from lossworks.training.language import LanguageTask

    if corpus is None:
        raise ValueError("a language model needs a corpus")
    return LanguageTask(spec, corpus)


def as_sums(*values: Tensor | float, like: Tensor) -> Tensor:
    """Return numbers as float64 (S,) on the device of ``like``."""
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=like.device) for value in values])
