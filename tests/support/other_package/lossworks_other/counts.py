"""A kind of training that Lossworks doesn't have: how often something happens, with its own kind of loss.

B examples.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.catalogue.declaration import Paper
from lossworks.data.batch import Batch
from lossworks.data.examples import Examples
from lossworks.data.learnt import Learnt
from lossworks.losses import Context
from lossworks.losses.value_head import ValueLoss
from lossworks.models import Classifier, Outputs, build_classifier, save_predictor
from lossworks.specs import ClassifierModelSpec, LossSpec, RunSpec
from lossworks.specs.base import Spec
from lossworks.tasks.interface import Mode, Task, as_sums

_INPUTS = 4


class Poisson(ValueLoss):
    """Poisson loss: of a count, from the logarithm of its expectation."""

    slug = "poisson"
    kind: ClassVar[str] = "count"
    formula = "e^f - y f"
    paper = Paper("Generalized Linear Models", "Nelder, Wedderburn", 1972)
    example = "lossworks train task=counts"

    def decode(self, outputs: Tensor) -> Tensor:
        return super().decode(outputs).exp()

    def values(self, outputs: Tensor, targets: Tensor, context: Context) -> Tensor:
        del context
        rate = outputs[..., 0]
        return rate.exp() - targets * rate


class EventsSpec(Spec):
    """Counts whose expectation is the exponential of a random linear function."""

    examples: int = Field(200, ge=10, description="a fifth of them is held out")


class CountsSpec(RunSpec):
    """Training of a model of counts."""

    task: Literal["counts"] = Field("counts", description="what is trained")
    data: EventsSpec = EventsSpec()
    model: ClassifierModelSpec = ClassifierModelSpec(width=16)
    loss: LossSpec = LossSpec(name="poisson")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        CountsTask.require_entries(self)
        return self


class CountsTask(Task):
    """Examples with a count each."""

    slug = "counts"
    title = "how often something happens"
    unit = "examples"
    spec: ClassVar[type[RunSpec]] = CountsSpec
    kinds = ("count",)
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/count_error": "min"}
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (("held-out error", "eval/count_error", "{:.3f}"),)

    def __init__(self, spec: CountsSpec, learnt: Learnt | None = None) -> None:
        super().__init__(spec, learnt)
        self.run = spec
        generator = torch.Generator().manual_seed(spec.seed)
        x = torch.randn(spec.data.examples, _INPUTS, generator=generator)
        y = torch.poisson((x @ torch.randn(_INPUTS, generator=generator) / 2).exp(), generator=generator)
        held_out = max(1, len(x) // 5)
        self.train, self.held_out = Examples(x[held_out:], y[held_out:]), Examples(x[:held_out], y[:held_out])

    @classmethod
    def obstacle(cls, spec: RunSpec) -> str | None:
        """Runs at once are as good as runs one by one."""
        del spec

    def build_model(self, model: Mapping[str, Any] | None = None) -> Classifier:
        spec = self.run.model if model is None else ClassifierModelSpec.parse(model, source="model")
        return build_classifier(spec, shape=(_INPUTS,), classes=1, seed=self.run.seed)

    def counts(self, batch: Batch) -> tuple[float, float]:
        return float((~batch["targets"].isnan()).sum()), 0.0

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        known = ~batch["targets"].isnan()
        error = (outputs.logits[..., 0].exp() - batch["targets"])[known].abs()
        return as_sums(error.sum(), float(known.sum()), like=own)

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        total, count = sums.tolist()
        return {"eval/count_error": total / max(count, 1.0)}, {}

    @classmethod
    def save(
        cls,
        spec: RunSpec,
        learnt: Learnt,
        to: Path,
        state: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
    ) -> None:
        del learnt
        save_predictor(
            to,
            reading="values",
            spec=spec.model,
            state=state,
            shape=(_INPUTS,),
            outputs=1,
            standardisation=None,
            further={"loss": {"name": spec.loss.name}},
            provenance=provenance,
        )
