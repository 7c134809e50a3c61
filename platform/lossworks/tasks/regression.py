"""Training of regressions: a number for each example, by a plain head, by bins, or by quantiles."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.registry import declaration
from lossworks.data.batch import Batch
from lossworks.data.learnt import Learnt
from lossworks.data.standardise import Standardisation
from lossworks.data.values import load_values
from lossworks.errors import UserError
from lossworks.losses.value_head import ValueLoss
from lossworks.metrics.regression import value_metrics, value_sums
from lossworks.models import Outputs
from lossworks.models.predictors import load_predictor, save_predictor
from lossworks.specs import ClassifierModelSpec, LossSpec, RunSpec
from lossworks.specs.tasks.values import ValuesSpec
from lossworks.tasks.examples import ExamplesTask, read_inputs, require_small, require_whole_bags
from lossworks.tasks.interface import Mode, Predictions, Simplest

_TARGET = "target"  # the role that bootstraps values
_TENTHS = 10


class RegressionSpec(RunSpec):
    """Training of a regression."""

    task: Literal["regression"] = Field("regression", description="what is trained")
    data: ValuesSpec = ValuesSpec()
    model: ClassifierModelSpec = ClassifierModelSpec()
    loss: LossSpec = LossSpec(name="squared-error")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_whole_bags(self, self.data.bag_size)
        if self.data.of_chain and _TARGET not in self.roles:
            raise ValueError(
                f"data.source={self.data.source}: values of states are learnt from those of the next, which "
                "a companion gives: set roles.target.ema=0.99"
            )
        require_small(self)
        RegressionTask.require_entries(self)
        return self


class RegressionTask(ExamplesTask):
    """Examples with a number each; the yardsticks are in the targets' own unit.

    Args:
        spec: The run.

    Raises:
        UserError: The examples can't be read, or the losses of a sum need heads of different widths.
    """

    slug = "regression"
    title = "a number for each example"
    spec: ClassVar[type[RunSpec]] = RegressionSpec
    kinds = ("value", "bag")
    provides = ("inputs", "targets", "segments", "next_inputs", "next_probabilities", "discounts")
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/rmse": "min", "eval/mae": "min", "eval/r2": "max"}
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("held-out root mean squared error", "eval/rmse", "{:.4g}"),
        ("held-out mean absolute error", "eval/mae", "{:.4g}"),
        ("held-out R²", "eval/r2", "{:.4f}"),
    )
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = (
        "Held-out errors",
        {"eval/rmse": "root mean squared error", "eval/mae": "mean absolute error"},
    )

    def __init__(self, spec: RegressionSpec, learnt: Learnt | None = None) -> None:
        super().__init__(spec)
        self.run = spec
        self.data = load_values(spec.data, spec.seed, learnt)
        self.train, self.held_out = self.data.train, self.data.held_out
        self.shape = self.data.shape
        widths = {self._width(loss) for loss in self.objective.terms}
        if len(widths) > 1:
            raise UserError(f"loss: terms of a sum need one head; these need {sorted(widths)} outputs")
        self.outputs = widths.pop()
        self._needs = {name for term in spec.loss.terms for name in declaration(term.name).requires}

    @property
    def learnt(self) -> Learnt:
        """See :attr:`Task.learnt`."""
        found = self.data.learnt
        return replace(found, facts={**found.facts, "outputs": self.outputs})

    @staticmethod
    def _width(loss: object) -> int:
        return loss.outputs if isinstance(loss, ValueLoss) else 1

    @classmethod
    def takes(cls, entry: Declaration, spec: RunSpec | None = None) -> bool:
        """See :meth:`Task.takes`; losses of bags need bags, and those of next states a chain."""
        if not super().takes(entry, spec):
            return False
        if spec is None:
            return True
        data = cast("RegressionSpec", spec).data
        if "next_probabilities" in entry.requires:
            return data.of_chain
        return entry.kind != "bag" or data.bag_size > 1

    @classmethod
    def condition(cls, entry: Declaration) -> str:
        """See :meth:`Task.condition`."""
        if "next_probabilities" in entry.requires:
            return f"{entry.slug} is for states: set data.source=chain:N and roles.target.ema"
        return f"{entry.slug} is for bags: set data.bag_size" if entry.kind == "bag" else ""

    @classmethod
    def reads(cls, spec: RunSpec) -> tuple[str, ...]:
        """Return the target network, of a chain."""
        return (_TARGET,) if cast("RegressionSpec", spec).data.of_chain else ()

    @classmethod
    def shaping(cls, spec: RunSpec) -> str:
        """Return the loss, whose hyperparameters decide the head's width and how it is read."""
        return spec.loss.model_dump_json()

    def row_classes(self) -> np.ndarray:
        """See :meth:`Task.row_classes`: the tenth of all targets, by size, that a target is in."""
        order = self.all_targets()[0].argsort(stable=True).argsort(stable=True)
        return (order * _TENTHS // len(order)).numpy()

    def simplest(self) -> Simplest | None:
        """Return what the mean of the training targets gets; of a chain the rewards' mean is no value."""
        if self.run.data.of_chain:
            return None
        train, held_out = self.all_targets()
        sums = value_sums(train.nanmean().expand_as(held_out), held_out)
        return Simplest("the mean alone", self.figures(sums)[0])

    @property
    def bag_size(self) -> int:
        """See :attr:`ExamplesTask.bag_size`."""
        return self.run.data.bag_size

    def counts(self, batch: Batch) -> tuple[float, float]:
        """Return how many targets are known, and nothing further."""
        return float((~batch["targets"].isnan()).sum()), 0.0

    def completed(self, batch: Batch, companions: Callable[[Batch, str], dict[str, Outputs]]) -> Batch:
        """Return a batch of transitions with what the target network says of the next states.

        Losses that read its distribution get ``next_probabilities``; for all others the target is the reward
        plus the discounted value of the next state, r + γ·v(s′).
        """
        if "next_inputs" not in batch:  # of no chain, or held out, where values are known
            return batch
        outputs = companions(batch, "next_inputs")[_TARGET].logits
        if "next_probabilities" in self._needs:
            return {**batch, "next_probabilities": outputs.softmax(-1)}
        discounts = batch["discounts"].to(outputs)
        bootstrapped = batch["targets"].to(outputs) + discounts * self.decode(outputs)
        return {**batch, "targets": torch.where(batch["targets"].isnan(), torch.nan, bootstrapped)}

    def decode(self, outputs: Tensor) -> Tensor:
        """Return the predictions (...) of outputs (..., m), on the scale that is trained on."""
        loss = self.objective.terms[0]
        return loss.decode(outputs) if isinstance(loss, ValueLoss) else outputs[..., 0]

    def measured(self, outputs: Outputs, batch: Batch) -> Tensor:
        """See :meth:`Task.measured`; a held-out state's value is known, and nothing follows it."""
        if "next_probabilities" in self._needs:
            batch = {**batch, "next_probabilities": outputs.logits.softmax(-1)}
        return super().measured(outputs, batch)

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return the sums of the yardsticks."""
        del own
        return value_sums(self.decode(outputs.logits), batch["targets"])

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the yardsticks."""
        found = value_metrics(sums, self.data.deviation)
        return {f"eval/{name}": value for name, value in found.items()}, {}

    @classmethod
    def predict(cls, folder: Path, file: Path) -> Predictions:
        """Return the value of each row; see :meth:`Task.predict`."""
        inputs, given, notes = read_inputs(folder, file)
        return Predictions({"value": load_predictor(folder).predict(inputs).tolist()}, given, notes)

    @classmethod
    def save(
        cls,
        spec: RunSpec,
        learnt: Learnt,
        to: Path,
        state: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
    ) -> None:
        """Write weights, configuration, loss and scales; see :meth:`Task.save`."""
        save_predictor(
            to,
            reading="values",
            spec=cast("RegressionSpec", spec).model,
            state=state,
            shape=tuple(learnt.fact("shape")),
            outputs=int(learnt.fact("outputs")),
            standardisation=Standardisation.of_facts(learnt.facts),
            columns=learnt.facts.get("columns"),
            further={
                "loss": {"name": spec.loss.name, **spec.loss.hyperparameters},
                "target": learnt.fact("target"),
            },
            provenance=provenance,
        )
