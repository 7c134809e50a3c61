"""What clients of a simulated federation have in common: data, split, architecture and loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from torch import Tensor

from lossworks.catalogue.registry import declaration
from lossworks.cohort import (
    Batches,
    Learner,
    Member,
    MemberLearner,
    StackedLearner,
    StackedModel,
    plan_batches,
)
from lossworks.data.examples import Examples
from lossworks.errors import UserError
from lossworks.losses.objective import row_losses
from lossworks.models import HeadedModel
from lossworks.models.operations import count_step_flops
from lossworks.tasks.interface import ExampleRows, Task
from lossworks.tasks.registry import task_of
from lossworks.training.weights.adapters import equip
from lossworks.training.weights.start import begin_from, learnt_of_start, trained_weights
from lossworks_federated.feature_shift import shifted_held_out, shifted_training
from lossworks_federated.spec_parts import SplitSpec, TaskSpec
from lossworks_federated.splits import Split, split_examples

_STACKED_FLOPS = 4e7
"""Operations of a client's step up to which all clients are trained at once.

Below, a step is over before a core has been told what to do, and stacks take a fraction of the time; above,
products are large enough, and stacks only leave the caches.
"""


@dataclass(frozen=True, eq=False)
class SharedSetup:
    """Everything that follows from a task.

    Attributes:
        task: What it follows from.
        kind: What is trained, with all data as they are.
        split: Whose the training rows are.
        train: The training rows, as their clients see them.
        held_out: The server's rows, as the clients together see them.
        learner: What clients learn from, and how they are measured.
        initial: Parameters before the first round; what is not trained is not among them.
    """

    task: TaskSpec
    kind: Task
    split: Split
    train: ExampleRows
    held_out: ExampleRows
    learner: Learner
    initial: Member

    def batches_of(self, client: int, server_round: int) -> Iterator[Tensor]:
        """Yield the rows of each batch that a client takes in a round, int64, shape (B,), one a step."""
        batches = self.batches([client], server_round, self.task.local.epochs)
        for rows, counts in zip(batches.rows, batches.counts, strict=True):
            yield rows[0, : counts[0]]

    def batches(self, clients: Sequence[int], server_round: int, epochs: int) -> Batches:
        """Return the batches that clients take in a round."""
        return plan_batches(
            [self.split.train[client] for client in clients],
            batch_size=self.task.local.batch_size,
            epochs=epochs,
            seeds=[(self.task.seed, server_round, client) for client in clients],
        )

    def of(self, task: TaskSpec) -> "SharedSetup":
        """Return the setup of a task that differs in local training, or in whose data are pooled, alone."""
        split = self.split.pooled() if task.pooled else self.split
        return replace(self, task=task, split=split)


def make_setup(task: TaskSpec) -> SharedSetup:
    """Return what clients of a task have in common; the same task gives the same in every process.

    Raises:
        UserError: The data can't be read or split, or clients can't train the model or its loss.
    """
    run = task.run_spec()
    kind = task_of(run).open(run, None, learnt_of_start(run))
    split = split_examples(_classes_of(kind, task.split), task.split, task.seed, kind.row_owners())
    return setup_with(task, kind, split)


def setup_with(task: TaskSpec, kind: Task, split: Split) -> SharedSetup:
    """Return what clients of a task have in common, with data that were read and split already.

    Raises:
        UserError: Clients can't train the model or its loss, or what it begins from can't be read.
    """
    run = kind.spec_of_run
    model = kind.build_model()
    if run.start is not None:
        begin_from(trained_weights(run.start, "start"), model)
    equip(model, run, kind.objective)
    if kind.objective.learns or any(True for _ in kind.objective.buffers()):
        raise UserError(
            f"loss.name={run.loss.name}: has parameters or a state of its own, in which clients would differ"
        )
    persistent = model.state_dict().keys() - dict(model.named_parameters()).keys()
    if persistent:
        raise UserError("the model keeps buffers, which federated averaging would not know how to treat")
    train = shifted_training(kind.train, split, task.split, task.seed)
    return SharedSetup(
        task=task,
        kind=kind,
        split=split,
        train=train,
        held_out=shifted_held_out(kind.held_out, task.split, task.seed),
        learner=_learner(
            kind, model, train, min(task.local.batch_size, max(map(len, split.train), default=1))
        ),
        initial={n: value.detach().clone() for n, value in model.named_parameters() if value.requires_grad},
    ).of(task)


def _classes_of(kind: Task, split: SplitSpec) -> np.ndarray:
    """Return a class of each training row, all the same of a task that knows none.

    Raises:
        UserError: The split deals rows by class, and there are none.
    """
    classes = kind.row_classes()
    if classes is None and split.kind in ("dirichlet", "shards"):
        raise UserError(
            f"split.kind={split.kind}: deals rows by their class, and those of task={kind.slug} have none; "
            "use iid, quantity, or natural with data.owner"
        )
    return np.zeros(len(kind.train), dtype=np.int64) if classes is None else classes


def _learner(kind: Task, model: HeadedModel, train: ExampleRows, batch_size: int) -> Learner:
    """Return what trains clients at once where that is possible and faster, else one on each core."""
    spec = kind.spec_of_run.loss
    of_rows = all(declaration(term.name).kind == "row" for term in spec.terms)
    if not (kind.classifies and of_rows and isinstance(train, Examples)):
        return MemberLearner(model, kind, train)
    loss, stacked = row_losses(spec), StackedModel(model)
    whole = all(parameter.requires_grad for parameter in model.parameters())
    few = count_step_flops(model, train.inputs[:1]) * batch_size <= _STACKED_FLOPS
    if whole and few and stacked.reason is None:
        return StackedLearner(stacked, train, loss, kind)
    return MemberLearner(model, kind, train, loss)


@lru_cache(maxsize=2)
def setup_of(task: str) -> SharedSetup:
    """Return what clients of a task have in common, from its JSON; made once in a process."""
    return make_setup(TaskSpec.model_validate_json(task))
