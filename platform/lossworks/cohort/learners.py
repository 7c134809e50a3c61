"""What members learn from: batches to gradients, and measuring; for members at once, or one by one.

Shapes: M members, m of them at work, B examples a member, D features, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from lossworks.cohort.batches import Batches
from lossworks.cohort.optimizers import Optimizer
from lossworks.cohort.rules import LocalRule, Seen
from lossworks.cohort.stacked import Member, Stack, StackedModel, member_of
from lossworks.cohort.training import TrainedMembers, copies, ended, members_in, move
from lossworks.data.batch import Batch
from lossworks.data.examples import Examples
from lossworks.losses.objective import Objective, RowLosses
from lossworks.models import HeadedModel, Outputs
from lossworks.tasks.interface import Evaluation, ExampleRows, Task
from lossworks.tracking import usable_cpus

T = TypeVar("T")
R = TypeVar("R")

_FLOATS_AT_ONCE = 2**22
"""Parameters of members that are trained at once."""
_EXAMPLES_AT_ONCE = 2**17
"""Of members that are measured together."""
_ROWS_AT_ONCE = 32
"""Of a member that is measured alone, such as sequences."""


class Learner(ABC):
    """What members of one architecture learn from, and how they are measured.

    Attributes:
        reason: Why members are trained one by one, or None where they are trained at once.
    """

    reason: str | None

    @abstractmethod
    def at_once(self, size: int) -> int:
        """Return how many members with so many parameters are best trained by one call."""

    @abstractmethod
    def train(
        self, params: Stack, batches: Batches, optimizer: Optimizer, rule: LocalRule | None = None
    ) -> TrainedMembers:
        """Train members, each on its own rows, and leave what was given as it was.

        A step descends on the mean loss of a member's batch plus the rule's penalty. A member that becomes
        non-finite disturbs no other.

        Args:
            params: Where each member starts, (M, …).
            batches: Of all members.
            optimizer: New, with per-member values in the order of ``batches.members``.
            rule: Hooks, with what they keep in the order of ``batches.members``.
        """

    @abstractmethod
    def features(self, params: Stack, inputs: Tensor) -> Tensor:
        """Return the features (m, B, …, D) of inputs (m, B, …), without a gradient."""

    @abstractmethod
    def losses(self, params: Stack, data: ExampleRows, rows: Sequence[np.ndarray]) -> list[float]:
        """Return the mean training loss of each member on rows of its own, one array a member."""

    @abstractmethod
    def measured(self, params: Stack, data: ExampleRows, rows: Sequence[np.ndarray]) -> list[Evaluation]:
        """Return what the task measures of each member on rows of its own.

        Args:
            params: Parameters (M, …), or (1, …) of one that all rows are put to.
            data: Where rows are read.
            rows: int64, one array for each member.
        """


class StackedLearner(Learner):
    """Examples in memory, a class each, and losses of rows: members are trained at once.

    Args:
        model: The architecture.
        examples: That are trained on.
        loss: Unreduced.
        task: What measures; None where nobody is measured.
    """

    def __init__(
        self, model: StackedModel, examples: Examples, loss: RowLosses, task: Task | None = None
    ) -> None:
        self.model, self.examples, self.loss, self._task = model, examples, loss, task
        self.reason = model.reason

    def at_once(self, size: int) -> int:
        """See :class:`Learner`: as many as stay in caches."""
        return max(1, _FLOATS_AT_ONCE // size)

    def train(
        self, params: Stack, batches: Batches, optimizer: Optimizer, rule: LocalRule | None = None
    ) -> TrainedMembers:
        """See :class:`Learner`."""
        now = copies(params, batches)
        steps = _StackedSteps(self, batches, rule)
        for step, front in enumerate((batches.counts > 0).sum(1).tolist()):
            leaves = {name: value[:front] for name, value in now.items()}
            gradients = steps.gradients(step, leaves)
            with torch.no_grad():
                move(leaves, gradients, optimizer, rule)
        return ended(now, batches, (steps.means * batches.counts).sum(0) / batches.counts.sum(0))

    @torch.no_grad()
    def features(self, params: Stack, inputs: Tensor) -> Tensor:
        """See :class:`Learner`."""
        return self.model(params, inputs)[0]

    @torch.no_grad()
    def losses(self, params: Stack, data: ExampleRows, rows: Sequence[np.ndarray]) -> list[float]:
        """See :class:`Learner`."""
        examples = cast("Examples", data)
        sizes = torch.tensor([len(own) for own in rows])
        valid = torch.arange(int(sizes.max())) < sizes[:, None]
        padded = torch.zeros(valid.shape, dtype=torch.int64)
        padded[valid] = torch.from_numpy(np.concatenate(rows))
        targets = torch.where(valid, examples.labels[padded], self.loss.ignore_index)
        found: list[float] = []
        at_once = max(1, _EXAMPLES_AT_ONCE // valid.shape[1])
        for start in range(0, len(rows), at_once):
            some = slice(start, start + at_once)
            own = {name: value[some] for name, value in params.items()}
            _, logits = self.model(own, examples.inputs[padded[some]])
            found += (self.loss(logits, targets[some]).double().sum(1) / sizes[some]).tolist()
        return found

    @torch.no_grad()
    def measured(self, params: Stack, data: ExampleRows, rows: Sequence[np.ndarray]) -> list[Evaluation]:
        """See :class:`Learner`."""
        if self._task is None:
            raise ValueError("a learner without a task measures nothing")
        batches = [data.batch(own) for own in rows]
        if members_in(params) == 1:
            inputs = torch.cat([batch["inputs"] for batch in batches])
            hidden, logits = (found[0] for found in self.model(params, inputs[None]))
            sizes = [len(own) for own in rows]
            parts = list(zip(hidden.split(sizes), logits.split(sizes), strict=True))
        else:
            members = range(len(rows))
            each = [_only(member_of(params, index)) for index in members]
            pairs = [self.model(each[index], batches[index]["inputs"][None]) for index in members]
            parts = [(hidden[0], logits[0]) for hidden, logits in pairs]
        return [
            self._task.evaluation(self._task.measured(Outputs(hidden, None, dense=logits), batch))
            for (hidden, logits), batch in zip(parts, batches, strict=True)
        ]


class _StackedSteps:
    """The steps of members that are trained at once.

    Attributes:
        means: Mean loss of each member's batch at each step, (T, M), as far as they were taken.
    """

    def __init__(self, learner: StackedLearner, batches: Batches, rule: LocalRule | None) -> None:
        self._learner, self._rows, self._counts, self._rule = learner, batches.rows, batches.counts, rule
        # All that doesn't depend on parameters is made for all steps at once: a step is short.
        valid = torch.arange(batches.rows.shape[2]) < batches.counts[..., None]
        self._targets = torch.where(valid, learner.examples.labels[batches.rows], learner.loss.ignore_index)
        self.means = torch.zeros(batches.counts.shape)

    def gradients(self, step: int, params: Stack) -> Sequence[Tensor]:
        """Return the gradients (m, …) of each member's loss and penalty at a step, and note its mean loss."""
        inputs = self._learner.examples.inputs[self._rows[step, : members_in(params)]]
        return self._learner.model.gradients(params, inputs, partial(self._objective, step, inputs))

    def _objective(self, step: int, inputs: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
        """Return what each member descends on, (m,), and keep its mean loss."""
        front = len(inputs)
        targets = self._targets[step, :front]
        own = self._learner.loss(logits, targets).sum(1) / self._counts[step, :front]
        self.means[step, :front] = own.detach()
        if self._rule is None:
            return own
        extra = self._rule.penalty(Seen(inputs, Outputs(hidden, None, dense=logits), targets))
        return own if extra is None else own + extra


class MemberLearner(Learner):
    """Whatever a task trains: each member by itself, as the training loop does it, and one on every core.

    A member is computed by one thread, so that it ends alike whoever else is trained and wherever.

    Args:
        model: The architecture, with whatever of it is not trained.
        task: What is trained, and how it is measured.
        rows: That are trained on.
        loss: Unreduced, of models with few classes, whose logits cost nothing; without it the task's
            objective is taken, which needs none.
    """

    def __init__(
        self, model: HeadedModel, task: Task, rows: ExampleRows, loss: RowLosses | None = None
    ) -> None:
        self.task, self.rows, self._loss = task, rows, loss
        self.reason = f"those of task={task.slug} with models of this size are trained one on each core"
        self._cores = usable_cpus()
        # A call puts parameters into a model for as long as it takes, so each that goes on needs its own.
        self._model, self._free = model, SimpleQueue[HeadedModel]()
        self._pool = ThreadPoolExecutor(self._cores, initializer=torch.set_num_threads, initargs=(1,))

    def at_once(self, size: int) -> int:
        """See :class:`Learner`: a few for each core, so that none waits long for the last."""
        return max(2 * self._cores, _FLOATS_AT_ONCE // size)

    def train(
        self, params: Stack, batches: Batches, optimizer: Optimizer, rule: LocalRule | None = None
    ) -> TrainedMembers:
        """See :class:`Learner`."""
        members = batches.members.tolist()

        def train_one(place: int) -> tuple[Member, float]:
            alone = rule.of(place) if rule else None
            return self._train_one(
                member_of(params, members[place]), batches, place, optimizer.of(place), alone
            )

        # Those with the most steps begin first, so that none is left alone for long.
        each, losses = zip(*self.each(train_one, range(len(members))), strict=True)
        now = {name: torch.stack([own[name] for own in each]) for name in params}
        return ended(now, batches, torch.tensor(losses))

    def _train_one(
        self, start: Member, batches: Batches, place: int, optimizer: Optimizer, rule: LocalRule | None
    ) -> tuple[Member, float]:
        """Train the member at a place; return its parameters and its mean loss."""
        total = elements = 0.0
        with self._lent() as model:
            leaves = {name: value for name, value in model.named_parameters() if name in start}
            own = {name: value.detach()[None] for name, value in leaves.items()}
            for name, value in own.items():
                value[0].copy_(start[name])
            for rows, count in zip(batches.rows[:, place], batches.counts[:, place].tolist(), strict=True):
                if not count:
                    break
                batch = self.rows.batch(rows[:count].numpy())
                descended = _Descended(self.task.objective, self._loss, rule)
                whole = model(batch, descended)
                gradients = torch.autograd.grad(whole, list(leaves.values()), materialize_grads=True)
                total, elements = total + descended.loss * descended.elements, elements + descended.elements
                with torch.no_grad():
                    move(own, [gradient[None] for gradient in gradients], optimizer, rule)
            ended_at = {name: value[0].clone() for name, value in own.items()}
        return ended_at, total / elements if elements else 0.0

    @torch.no_grad()
    def features(self, params: Stack, inputs: Tensor) -> Tensor:
        """See :class:`Learner`."""

        def hidden(outputs: Outputs, batch: Batch) -> Tensor:
            del batch
            return outputs.hidden

        def of(place: int) -> Tensor:
            return self.called(member_of(params, place), {"inputs": inputs[place]}, hidden)

        return torch.stack([of(place) for place in range(len(inputs))])

    def losses(self, params: Stack, data: ExampleRows, rows: Sequence[np.ndarray]) -> list[float]:
        """See :class:`Learner`."""
        return [found.loss for found in self.measured(params, data, rows)]

    def measured(self, params: Stack, data: ExampleRows, rows: Sequence[np.ndarray]) -> list[Evaluation]:
        """See :class:`Learner`."""
        count = members_in(params)
        parts = [
            (place, own[start : start + _ROWS_AT_ONCE])
            for place, own in enumerate(rows)
            for start in range(0, len(own), _ROWS_AT_ONCE)
        ]

        @torch.no_grad()
        def sums(part: tuple[int, np.ndarray]) -> Tensor:
            place, own = part
            member = member_of(params, place if count > 1 else 0)
            return self.called(member, data.batch(own), self.task.measured)

        totals: dict[int, Tensor] = {}
        for (place, _), found in zip(parts, self.each(sums, parts), strict=True):
            totals[place] = totals[place] + found if place in totals else found
        return [self.task.evaluation(totals[place]) for place in range(len(rows))]

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return what some work gives for each item, in their order; as many at once as there are cores."""
        return list(self._pool.map(work, items))

    def called(self, params: Member, batch: Batch, objective: object) -> Tensor:
        """Return what an objective gives inside the forward of a model with these parameters."""
        with self._lent() as model:
            return cast("Tensor", functional_call(model, params, (batch, objective)))

    @contextmanager
    def _lent(self) -> Iterator[HeadedModel]:
        """Lend a model that nobody else computes with meanwhile; its parameters may hold anything."""
        try:
            model = self._free.get_nowait()
        except Empty:
            model = deepcopy(self._model)
        try:
            yield model
        finally:
            self._free.put(model)


class _Descended:
    """What a member descends on, inside its model's forward.

    Attributes:
        loss: Its mean loss, without the penalty, once it has been called.
        elements: How many it is a mean of.
    """

    def __init__(self, objective: Objective, loss: RowLosses | None, rule: LocalRule | None) -> None:
        self._objective, self._loss, self._rule = objective, loss, rule
        self.loss = self.elements = 0.0

    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        counts = self._objective.counts(batch)
        self.elements = counts[0]
        if self._loss is None:
            own = self._objective.total(self._objective(outputs, batch), counts)
        else:
            own = self._loss(outputs.logits, batch["targets"]).sum() / counts[0]
        self.loss = float(own.detach())
        if self._rule is None:
            return own
        alone = outputs.at(None)
        if self._loss is not None:  # the logits are there
            alone = Outputs(alone.hidden, None, dense=outputs.logits[None])
        extra = self._rule.penalty(Seen(batch["inputs"][None], alone, batch["targets"][None]))
        return own if extra is None else own + extra[0]


def _only(member: Member) -> Stack:
    return {name: value[None] for name, value in member.items()}
