"""Training of classifiers: of examples with a class each, or of bags of which only proportions count."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.registry import declaration
from lossworks.data import load_examples
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.examples import ExampleData
from lossworks.data.learnt import Learnt
from lossworks.data.standardise import Standardisation
from lossworks.errors import UserError
from lossworks.metrics import ClassSums, class_sums
from lossworks.models import Outputs, load_classifier, save_classifier
from lossworks.specs import ClassifierModelSpec, ExamplesSpec, RunSpec
from lossworks.tasks.examples import ExamplesTask, read_inputs, require_small, require_whole_bags
from lossworks.tasks.interface import Mode, Predictions, Prepared, Say, Simplest

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class ClassifierSpec(RunSpec):
    """Training of a classifier."""

    task: Literal["classification"] = Field("classification", description="what is trained")
    data: ExamplesSpec = ExamplesSpec()
    model: ClassifierModelSpec = ClassifierModelSpec()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_whole_bags(self, self.data.bag_size)
        require_small(self)
        ClassificationTask.require_entries(self)
        return self


class ClassificationTask(ExamplesTask):
    """Labelled examples, measured by accuracy, calibration, and means over classes.

    Args:
        spec: The run.
        learnt: What the model has learnt from data before.
        data: Its examples, where they were read already.

    Raises:
        UserError: The examples can't be read, or are of more than two classes where the loss is for two.
    """

    slug = "classification"
    title = "a classifier of examples, or of bags of examples"
    spec: ClassVar[type[RunSpec]] = ClassifierSpec
    kinds = ("row", "logits", "margin", "bag", "sequence", "distillation")
    provides = ("inputs", "targets", "segments")
    classifies = True
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/accuracy": "max",
        "eval/cross_entropy": "min",
        "eval/ece": "min",
        "eval/brier": "min",
        "eval/balanced_accuracy": "max",
        "eval/macro_f1": "max",
    }
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("held-out accuracy", "eval/accuracy", "{:.4f}"),
        ("held-out cross-entropy", "eval/cross_entropy", "{:.4f} nats"),
        ("calibration error", "eval/ece", "{:.4f}"),
        ("Brier score", "eval/brier", "{:.4f}"),
        ("mean recall of classes", "eval/balanced_accuracy", "{:.4f}"),
        ("mean F1 of classes", "eval/macro_f1", "{:.4f}"),
    )
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = (
        "Held-out accuracy and calibration error",
        {"eval/accuracy": "accuracy", "eval/ece": "calibration error"},
    )

    def __init__(
        self, spec: ClassifierSpec, learnt: Learnt | None = None, data: ExampleData | None = None
    ) -> None:
        super().__init__(spec)
        self.run = spec
        self.data = load_examples(spec.data, spec.seed, learnt) if data is None else data
        self.train, self.held_out = self.data.train, self.data.held_out
        self.shape = self.data.shape
        self.outputs = len(self.data.names)
        for term in spec.loss.terms:
            if declaration(term.name).kind == "margin" and len(self.data.names) != 2:
                raise UserError(
                    f"loss.name={term.name} is for two classes, and there are {', '.join(self.data.names)}: "
                    "set data.classes=[A, B]"
                )

    @classmethod
    def prepare(cls, spec: RunSpec, say: Say | None = None, learnt: Learnt | None = None) -> Prepared:
        """See :meth:`Task.prepare`."""
        found = super().prepare(spec, say, learnt)
        classes = found.learnt.fact("classes") if found.learnt is not None else ()
        return replace(found, guess=math.log(len(classes)))

    @property
    def learnt(self) -> Learnt:
        """See :attr:`Task.learnt`."""
        return self.data.learnt

    @classmethod
    def takes(cls, entry: Declaration, spec: RunSpec | None = None) -> bool:
        """See :meth:`Task.takes`; losses of margins need two classes, those of bags need bags.

        A loss of whole answers takes a class for an answer of one token; those of steps, or of what a model
        writes itself, have nothing to look at.
        """
        if not super().takes(entry, spec):
            return False
        if entry.kind == "sequence" and (entry.requires or "own-outputs" in entry.flags):
            return False
        if spec is None:
            return True
        data = cast("ClassifierSpec", spec).data
        if entry.kind == "margin":
            return data.may_be_binary
        return entry.kind != "bag" or data.bag_size > 1

    @classmethod
    def condition(cls, entry: Declaration) -> str:
        """See :meth:`Task.condition`."""
        if entry.kind == "margin":
            return f"{entry.slug} is for two classes: set data.classes=[A, B]"
        return f"{entry.slug} is for bags: set data.bag_size" if entry.kind == "bag" else ""

    def simplest(self) -> Simplest:
        """Return what the classes' shares in the training examples get, taken for probabilities."""
        train, held_out = self.all_targets()
        counts = torch.bincount(train[train != IGNORE_INDEX], minlength=self.outputs) + 1.0
        shares = (counts / counts.sum()).log().expand(len(held_out), -1)
        sums = class_sums(shares, held_out, IGNORE_INDEX).values
        return Simplest("the classes' shares alone", self.figures(sums)[0])

    @property
    def bag_size(self) -> int:
        """See :attr:`ExamplesTask.bag_size`."""
        return self.run.data.bag_size

    def counts(self, batch: Batch) -> tuple[float, float]:
        """Return how many examples count, and nothing further."""
        return float((batch["targets"] != IGNORE_INDEX).sum()), 0.0

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return the sums of the yardsticks."""
        del own
        return class_sums(outputs.logits, batch["targets"], IGNORE_INDEX).values

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the yardsticks, and the reliability by bin of confidence."""
        found = ClassSums(sums)
        return {f"eval/{name}": value for name, value in found.metrics().items()}, {
            "reliability": found.reliability()
        }

    @classmethod
    def draw(cls, axes: "Axes", pictured: Mapping[str, Any]) -> bool:
        """Draw the reliability; see :meth:`Task.draw`."""
        from lossworks.reporting.reliability import draw_reliability

        draw_reliability(axes, pictured.get("reliability"))
        return True

    def row_classes(self) -> np.ndarray:
        """See :meth:`Task.row_classes`."""
        return self.data.train.labels.numpy()

    def row_owners(self) -> np.ndarray | None:
        """See :meth:`Task.row_owners`."""
        return self.data.owners

    def class_names(self) -> tuple[str, ...]:
        """See :meth:`Task.class_names`."""
        return self.data.names

    @classmethod
    def predict(cls, folder: Path, file: Path) -> Predictions:
        """Return the class of each row, and the probability of every class; see :meth:`Task.predict`."""
        found = load_classifier(folder)
        inputs, given, notes = read_inputs(folder, file)
        p = found.probabilities(inputs)
        columns: dict[str, Sequence[Any]] = {"class": [found.names[at] for at in p.argmax(1)]}
        columns |= {f"p({name})": p[:, at].tolist() for at, name in enumerate(found.names)}
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
        """Write weights, configuration, class names and scale of the inputs; see :meth:`Task.save`."""
        save_classifier(
            to,
            spec=cast("ClassifierSpec", spec).model,
            state=state,
            shape=tuple(learnt.fact("shape")),
            names=tuple(learnt.fact("classes")),
            standardisation=Standardisation.of_facts(learnt.facts),
            columns=learnt.facts.get("columns"),
            provenance=provenance,
        )
