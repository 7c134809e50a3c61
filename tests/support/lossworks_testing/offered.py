"""Entries for tests, offered as another installed package would offer them, and trainings with them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lossworks.catalogue import registry
from lossworks.catalogue.declaration import Paper, number
from lossworks.catalogue.entry import Entry
from lossworks.catalogue.registry import FILE, SECTIONS, Catalogue
from lossworks.data.batch import Batch
from lossworks.losses import Loss, RowLoss
from lossworks.losses.objective import Objective
from lossworks.models import Outputs
from lossworks.tasks.analyses import Finding
from lossworks.tasks.interface import Task
from lossworks.tasks.methods import Method, Trained
from lossworks_testing.training import run_training


class Uncertainty(RowLoss):
    """Cross-entropy weighted by a learnt uncertainty: least where s is the logarithm of cross-entropy."""

    slug = "uncertainty"
    formula = "exp(-s) (lse - z_y) + s, s learnt"
    paper = Paper("Multi-Task Learning Using Uncertainty to Weigh Losses", "Kendall, Gal, Cipolla", 2018)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.s = nn.Parameter(torch.zeros(1))
        self.matrix = nn.Parameter(torch.ones(2, 2))  # to see that it does not decay
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def phi(self, target: Tensor, logsumexp: Tensor, classes: int) -> Tensor:  # noqa: ARG002
        if self.training:
            self.calls += 1
        return (-self.s).exp() * (logsumexp - target) + self.s + 0.0 * self.matrix.sum()


class Distillation(Loss):
    """Cross-entropy against a teacher's probabilities (Hinton, Vinyals, Dean 2015, at temperature 1)."""

    slug = "to-teacher"
    roles = ("teacher",)
    kind = "logits"
    formula = "-Σ_k q_k log p_k, q the teacher's"
    paper = Paper("Distilling the Knowledge in a Neural Network", "Hinton, Vinyals, Dean", 2015)

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:  # noqa: ARG002
        valid = batch["targets"] != self.ignore_index
        theirs = outputs.roles["teacher"]
        values = -(theirs.logits.softmax(-1) * outputs.logits.log_softmax(-1)).sum(-1)
        return self.reduce(torch.where(valid, values, 0), valid.to(values))


class Recorder(Method):
    """A method that keeps what it is asked, in order, and whose state a checkpoint has to keep."""

    slug = "recorder"
    formula = "x"
    paper = Paper("None", "Nobody", 2000)

    factor: float = number(1.0, "of gradients", gt=0)

    calls: list[str]
    last: "Recorder"

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.calls, self.total = [], torch.zeros(())
        Recorder.last = self

    def start(self, task: Task, model: nn.Module) -> None:  # noqa: ARG002
        self.calls.append(f"start of {task.slug}")

    def batch(self, batch: Batch, step: int) -> Batch:
        self.calls.append(f"batch of {len(batch['targets'])} at {step}")
        return batch

    def loss(self, outputs: Outputs, batch: Batch, objective: Objective) -> Tensor:
        self.calls.append("loss")
        return super().loss(outputs, batch, objective)

    def gradients(self, model: nn.Module, step: int) -> None:
        # What was seen before decides, so that a state that is lost changes the curve.
        scale = self.factor / (1 + self.total)
        for parameter in model.parameters():
            parameter.grad.mul_(scale)
        self.total = self.total + 1
        self.calls.append(f"gradients at {step}")

    def after_step(self, model: nn.Module, step: int) -> None:  # noqa: ARG002
        self.calls.append(f"after_step {step}")

    def finish(self, trained: Trained) -> Finding:  # noqa: ARG002
        self.calls.append("finish")
        return Finding({"recorder/total": float(self.total)})

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total.clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.total = state["total"]

    def result(self) -> dict[str, Tensor]:
        return {"total": self.total}


def offer(patch: pytest.MonkeyPatch, *kinds: type[Entry]) -> None:
    """Put entries into the catalogue, for as long as the patch holds."""
    catalogue = Catalogue(FILE, SECTIONS)
    found, refused = catalogue._all
    catalogue.__dict__["_all"] = ({**found, **{kind.slug: kind.declaration() for kind in kinds}}, refused)
    patch.setattr(registry, "_OURS", catalogue)


def run_offered(runs: list[tuple[dict[str, Any], str]], **options: Any) -> list[dict[str, Any]]:
    """Train specs that may name the entries of this file into folders, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        offer(patch, Uncertainty, Distillation, Recorder)
        return [run_training(values, None, folder, **options) for values, folder in runs]
