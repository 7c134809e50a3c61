"""What clients of a simulated federation have in common: data, split, architecture and loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from lossworks.cohort import Batches, Member, StackedModel, plan_batches
from lossworks.data.examples import ExampleData, load_examples
from lossworks.errors import UserError
from lossworks.losses.objective import RowLosses, row_losses
from lossworks.models import build_classifier
from lossworks_federated.spec_parts import TaskSpec
from lossworks_federated.splits import Split, split_examples, with_feature_noise


@dataclass(frozen=True, eq=False)
class SharedSetup:
    """Everything that follows from a task.

    Attributes:
        task: What it follows from.
        data: All examples; the held-out ones are the server's.
        split: Whose the training examples are.
        inputs: Of all training examples, with each client's feature noise, (N, …).
        labels: Their classes, int64 (N,).
        model: The architecture.
        initial: Parameters before the first round.
        loss: The local objective, unreduced.
    """

    task: TaskSpec
    data: ExampleData
    split: Split
    inputs: Tensor
    labels: Tensor
    model: StackedModel
    initial: Member
    loss: RowLosses

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


def make_setup(task: TaskSpec) -> SharedSetup:
    """Return what clients of a task have in common; the same task gives the same in every process.

    Raises:
        UserError: The data can't be read or split, or the loss is none of classifiers' rows.
    """
    data = load_examples(task.data, task.seed)
    split = split_examples(data.train.labels.numpy(), task.split, task.seed, data.owners)
    model = build_classifier(task.model, shape=data.shape, classes=len(data.names), seed=task.seed)
    if any(True for _ in model.buffers()):
        raise UserError("the model keeps buffers, which federated averaging would not know how to treat")
    return SharedSetup(
        task=task,
        data=data,
        split=split,
        inputs=with_feature_noise(data.train.inputs, split, task.split.noise, task.seed),
        labels=data.train.labels,
        model=StackedModel(model),
        initial={name: value.detach().clone() for name, value in model.named_parameters()},
        loss=row_losses(task.loss),
    )


@lru_cache(maxsize=2)
def setup_of(task: str) -> SharedSetup:
    """Return what clients of a task have in common, from its JSON; made once in a process."""
    return make_setup(TaskSpec.model_validate_json(task))
