"""Methods: procedures that change how training goes, or that follow it, through few fixed hooks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from lossworks.catalogue.entry import Settings
from lossworks.catalogue.registry import create
from lossworks.data.batch import Batch
from lossworks.losses.objective import Objective
from lossworks.models import HeadedModel, Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Finding
from lossworks.tasks.interface import ExampleRows, Measure, Mode, Task

Collect = Callable[[Measure, ExampleRows, np.ndarray], Tensor]
"""Called with what to take inside the forward, (B, …) of each batch, where rows are read, and which; returns
all of them in order, float64 (N, …), on every rank."""


@dataclass(frozen=True)
class Trained:
    """A model after training, as a method sees it.

    Attributes:
        task: With its data.
        collect: Takes numbers of rows inside the model's forward, in evaluation mode; every rank calls.
    """

    task: Task
    collect: Collect


class Method(Settings):
    """A method; the hooks do nothing unless a subclass overrides them.

    They are called on every rank alike, in this order: ``fit_to`` once, before the model is distributed and
    before a checkpoint is read; ``start`` once, then at every step ``batch`` for each
    micro-batch, ``loss`` inside the model's forward, ``gradients`` after the last backward pass,
    ``after_step`` after the update; and ``finish`` once, when all steps are done.

    Attributes:
        yardsticks: What ``finish`` finds by which runs can be compared, and which direction is better.
        newest: Whether a run's newest checkpoint stands for it, and not that of the least held-out loss,
            since the method comes to its end by a schedule.
    """

    section: ClassVar[str] = "methods"
    kind: ClassVar[str] = "method"
    yardsticks: ClassVar[Mapping[str, Mode]] = {}
    newest: ClassVar[bool] = False

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse runs that it can't be part of, before anything starts.

        Raises:
            UserError: Naming what it needs.
        """
        del task, spec

    def fit_to(self, task: Task, model: HeadedModel) -> None:
        """Change the model's parts, and make the state that depends on them; the whole model is here.

        Names and shapes of its tensors must stay.

        Raises:
            UserError: It is no model for this.
        """
        del task, model

    def start(self, task: Task, model: nn.Module) -> None:
        """Look at the task and the distributed model before the first step, or before going on."""
        del task, model

    def batch(self, batch: Batch, step: int) -> Batch:
        """Return the batch that is trained on at a step, counted from 1."""
        del step
        return batch

    def loss(self, outputs: Outputs, batch: Batch, objective: Objective) -> Tensor:
        """Return the sums (S,) that are descended on, of as many numbers as the objective has.

        Args:
            outputs: Of the model; ``outputs.rerun`` gives those for other inputs.
            batch: A micro-batch.
            objective: The spec's sum of losses.
        """
        found: Tensor = objective(outputs, batch)
        return found

    def gradients(self, model: nn.Module, step: int) -> None:
        """Change the gradients of the distributed model before they are clipped."""
        del model, step

    def after_step(self, model: nn.Module, step: int) -> None:
        """Look at or change the distributed model after an update."""
        del model, step

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do, on all ranks alike: training then ends before its last step."""
        return False

    def finish(self, trained: Trained) -> Finding:
        """Return what the method found after training."""
        del trained
        return Finding({})

    def state(self) -> dict[str, Tensor]:
        """Return what going on after an interruption needs, by name; it is kept with each checkpoint."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        del state

    def exported(
        self, spec: RunSpec, state: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[RunSpec, Mapping[str, Tensor]]:
        """Return what a checkpoint is a model of, where the method has made it another than the spec says.

        It is called on a method that has seen no model, wherever the weights of a run are used: exported,
        evaluated, analysed, begun from, or put beside another model.

        Args:
            spec: The run.
            state: The model's tensors by name, whole.
            kept: The method's own state in the same checkpoint.

        Returns:
            The spec with the part of the model as it is to be built, and its tensors.

        Raises:
            UserError: The checkpoint is of no use yet.
        """
        del kept
        return spec, state

    def result(self) -> dict[str, Tensor]:
        """Return what was made for use after training; it is kept in the run's folder."""
        return {}


def descended(spec: RunSpec) -> tuple[str, ...]:
    """Return what a run descends on: the losses of its sum, or a method with a loss of its own."""
    methods = [create(one.name, **one.hyperparameters) for one in spec.methods]
    own = [method.slug for method in methods if replaces_loss(method)]
    return tuple(own[:1]) or spec.loss.titles


def replaces_loss(method: Method) -> bool:
    """Return whether a method has a loss of its own."""
    return type(method).loss is not Method.loss
