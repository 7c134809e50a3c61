"""Training of classifiers: examples, accuracy, calibration."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lossworks.data import BagOrder, Order, load_examples
from lossworks.metrics import ClassSums, class_sums
from lossworks.models import Classifier, Head, HeadedModel, build_classifier
from lossworks.specs import ClassifierSpec
from lossworks.training.batches import IGNORE_INDEX
from lossworks.training.operations import count_step_flops
from lossworks.training.task import Evaluation, Sums, Task, as_sums


class ClassificationTask(Task):
    """Labelled examples; the yardsticks are cross-entropy, accuracy, calibration error and Brier score.

    Args:
        spec: The run.

    Raises:
        UserError: The examples can't be read.
    """

    unit: ClassVar[str] = "examples"

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__(spec)
        self.spec = spec
        self._data = load_examples(spec.data, spec.seed)
        self.train, self.held_out = self._data.train, self._data.held_out

    def order(self) -> Order:
        """Return an order of whole bags, or of examples where there are no bags."""
        spec = self.spec
        return BagOrder(len(self.train), spec.data.bag_size, spec.batch_size, spec.seed)

    def build_model(self) -> Classifier:
        """Return the untrained model."""
        data = self._data
        return build_classifier(
            self.spec.model, shape=data.shape, classes=len(data.names), seed=self.spec.seed
        )

    def flops_per_unit(self, model: HeadedModel) -> float:
        """Return the operations an example, counted on two of them."""
        inputs, _ = self.train.batch(np.arange(2) % len(self.train))
        return count_step_flops(model, inputs) / len(inputs)

    def counts(self, targets: Tensor) -> tuple[float, float]:
        """Return how many examples count, and nothing further."""
        return float((targets != IGNORE_INDEX).sum()), 0.0

    def train_metrics(self, loss: float, elements: float, units: float, further: float) -> dict[str, float]:
        """Return the loss."""
        del units, further
        return {"train/loss": loss / elements}

    def measure(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        """Return summed loss, its elements, and the sums of the yardsticks."""
        loss = self.objective(hidden, head, targets)
        own = as_sums(loss, self.objective.count(targets), like=hidden)
        return torch.cat((own, class_sums(head.logits(hidden), targets, IGNORE_INDEX).values))

    def evaluation(self, sums: Tensor) -> Evaluation:
        """Return the loss an example, and the yardsticks."""
        found = ClassSums(sums[2:])
        yardsticks = {f"eval/{name}": value for name, value in found.metrics().items()}
        return Evaluation(float(sums[0] / sums[1]), yardsticks, found.reliability())

    def analysed(self, evaluation: Evaluation, over: Sums) -> Evaluation:
        """Return the evaluation with the measures of neural collapse, if they are asked for."""
        if not self.spec.neural_collapse:
            return evaluation
        from lossworks.training.collapse import measure_collapse

        measures, matrices = measure_collapse(self.train, len(self._data.names), over)
        return replace(
            evaluation,
            yardsticks=evaluation.yardsticks | {f"eval/{name}": value for name, value in measures.items()},
            collapse=matrices,
        )
