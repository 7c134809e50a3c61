"""Training of multi-label models: a set of labels for each example, never a matrix of examples by labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.label_sets import load_label_sets
from lossworks.data.learnt import Learnt
from lossworks.data.standardise import Standardisation
from lossworks.losses.multi_label import MultiLabelLoss
from lossworks.metrics.ranking import ranking_metrics, ranking_sums
from lossworks.models import Outputs
from lossworks.models.predictors import load_predictor, save_predictor
from lossworks.specs import ClassifierModelSpec, LossSpec, RunSpec
from lossworks.specs.tasks.values import LabelSetsSpec
from lossworks.tasks.examples import ExamplesTask, read_inputs, require_small
from lossworks.tasks.interface import Mode, Predictions, Simplest

_DEEPEST = 5


class MultiLabelSpec(RunSpec):
    """Training of a multi-label model."""

    task: Literal["multi-label"] = Field("multi-label", description="what is trained")
    data: LabelSetsSpec = LabelSetsSpec()
    model: ClassifierModelSpec = ClassifierModelSpec()
    loss: LossSpec = LossSpec(name="decoupled-softmax")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_small(self)
        MultiLabelTask.require_entries(self)
        return self


class MultiLabelTask(ExamplesTask):
    """Examples with a set of labels each, ranked by their scores.

    Args:
        spec: The run.

    Raises:
        UserError: The examples can't be read.
    """

    slug = "multi-label"
    title = "a set of labels for each example"
    spec: ClassVar[type[RunSpec]] = MultiLabelSpec
    kinds = ("multi-label",)
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/precision_at_1": "max",
        "eval/precision_at_3": "max",
        "eval/precision_at_5": "max",
        "eval/recall_at_5": "max",
        "eval/ndcg_at_5": "max",
    }
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("held-out precision at 1", "eval/precision_at_1", "{:.4f}"),
        ("held-out precision at 3", "eval/precision_at_3", "{:.4f}"),
        ("held-out precision at 5", "eval/precision_at_5", "{:.4f}"),
        ("held-out recall at 5", "eval/recall_at_5", "{:.4f}"),
        ("held-out nDCG at 5", "eval/ndcg_at_5", "{:.4f}"),
    )
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = (
        "Held-out precision",
        {"eval/precision_at_1": "at 1", "eval/precision_at_5": "at 5"},
    )

    def __init__(self, spec: MultiLabelSpec, learnt: Learnt | None = None) -> None:
        super().__init__(spec)
        self.run = spec
        self.data = load_label_sets(spec.data, spec.seed, learnt)
        self.train, self.held_out = self.data.train, self.data.held_out
        self.shape = self.data.shape
        self.outputs = len(self.data.names)

    @classmethod
    def obstacle(cls, spec: RunSpec) -> str | None:
        """See :meth:`Task.obstacle`; embeddings of unit length are no plain linear head."""
        run = cast("MultiLabelSpec", spec)
        unit = [term.name for term in run.loss.terms if term.hyperparameters.get("normalise")]
        if unit:
            return f"loss.normalise=true of {unit[0]} takes embeddings, and runs at once give scores"
        return super().obstacle(spec)

    def counts(self, batch: Batch) -> tuple[float, float]:
        """Return how many examples have a label, and nothing further."""
        return float((batch["targets"] != IGNORE_INDEX).any(-1).sum()), 0.0

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return the sums of the yardsticks."""
        del own
        loss = cast("MultiLabelLoss", self.objective.terms[0])
        best = loss.best(outputs, min(_DEEPEST, len(self.data.names)))
        return ranking_sums(best, batch["targets"], IGNORE_INDEX)

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the yardsticks."""
        return {f"eval/{name}": value for name, value in ranking_metrics(sums).items()}, {}

    def simplest(self) -> Simplest:
        """Return what the commonest labels of the training examples get, said of every example."""
        train, held_out = self.all_targets()
        counts = torch.bincount(train[train != IGNORE_INDEX], minlength=self.outputs)
        best = counts.sort(descending=True, stable=True).indices[:_DEEPEST]
        sums = ranking_sums(best.expand(len(held_out), -1), held_out, IGNORE_INDEX)
        return Simplest("the commonest labels alone", self.figures(sums)[0])

    @property
    def learnt(self) -> Learnt:
        """See :attr:`Task.learnt`."""
        return self.data.learnt

    @classmethod
    def predict(cls, folder: Path, file: Path) -> Predictions:
        """Return the best five labels of each row with their scores; see :meth:`Task.predict`."""
        found = load_predictor(folder)
        inputs, given, notes = read_inputs(folder, file)
        scores = found.predict(inputs)
        best = np.argsort(-scores, axis=1)[:, :_DEEPEST]
        columns: dict[str, Sequence[Any]] = {}
        for place in range(best.shape[1]):
            columns[f"label {place + 1}"] = [found.names[at] for at in best[:, place]]
            columns[f"score {place + 1}"] = np.take_along_axis(scores, best[:, [place]], 1)[:, 0].tolist()
        return Predictions(columns, given, notes)

    @classmethod
    def save(
        cls,
        spec: RunSpec,
        learnt: Learnt,
        to: Path,
        state: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
    ) -> None:
        """Write weights, configuration, loss and names of the labels; see :meth:`Task.save`."""
        save_predictor(
            to,
            reading="labels",
            spec=cast("MultiLabelSpec", spec).model,
            state=state,
            shape=tuple(learnt.fact("shape")),
            outputs=len(learnt.fact("names")),
            standardisation=Standardisation.of_facts(learnt.facts),
            columns=learnt.facts.get("columns"),
            further={
                "loss": {"name": spec.loss.name, **spec.loss.hyperparameters},
                "names": learnt.fact("names"),
            },
            provenance=provenance,
        )
