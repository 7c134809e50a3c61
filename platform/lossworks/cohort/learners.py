"""What members learn from: batches to gradients, and measuring; for members at once, or one by one.

Shapes: M members, m of them at work, B examples a member, D features, K classes.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from lossworks.cohort.batches import Batches
from lossworks.cohort.rules import LocalRule, Seen
from lossworks.cohort.stacked import Member, Stack, StackedModel, member_of
from lossworks.data.batch import Batch
from lossworks.data.examples import Examples
from lossworks.losses.objective import RowLosses
from lossworks.models import HeadedModel, Outputs
from lossworks.tasks.interface import Evaluation, ExampleRows, Task

T = TypeVar("T")
R = TypeVar("R")

_EXAMPLES_AT_ONCE = 2**17
"""Of members that are measured together."""
_ROWS_AT_ONCE = 32
"""Of a member that is measured alone, such as sequences."""


class Steps(ABC):
    """The steps of members that are to be trained.

    Attributes:
        means: Mean loss of each member's batch at each step, (T, M), as far as they were taken.
        weights: How many elements each is a mean of, (T, M).
    """

    means: Tensor
    weights: Tensor

    @abstractmethod
    def gradients(self, step: int, params: Stack, rule: LocalRule | None) -> Sequence[Tensor]:
        """Return the gradients (m, …) of each member's loss and penalty at a step, and note its mean loss.

        Args:
            step: From 0.
            params: Parameters (m, …) of the members that are still at work.
            rule: Whose penalty is added.
        """


class Learner(ABC):
    """What members of one architecture learn from, and how they are measured.

    Attributes:
        reason: Why members are trained one by one, or None where they are trained at once.
    """

    reason: str | None

    @abstractmethod
    def steps(self, batches: Batches) -> Steps:
        """Return the steps of members that take these batches."""

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

    def steps(self, batches: Batches) -> Steps:
        """See :class:`Learner`."""
        return _StackedSteps(self, batches)

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
        if _members(params) == 1:
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


class _StackedSteps(Steps):
    def __init__(self, learner: StackedLearner, batches: Batches) -> None:
        self._learner, self._rows = learner, batches.rows
        # All that doesn't depend on parameters is made for all steps at once: a step is short.
        self.weights = batches.counts
        valid = torch.arange(batches.rows.shape[2]) < batches.counts[..., None]
        self._targets = torch.where(valid, learner.examples.labels[batches.rows], learner.loss.ignore_index)
        self.means = torch.zeros(batches.counts.shape)

    def gradients(self, step: int, params: Stack, rule: LocalRule | None) -> Sequence[Tensor]:
        """See :class:`Steps`."""
        front = _members(params)
        inputs = self._learner.examples.inputs[self._rows[step, :front]]
        objective = partial(self._objective, step, inputs, rule)
        return self._learner.model.gradients(params, inputs, objective)

    def _objective(
        self, step: int, inputs: Tensor, rule: LocalRule | None, hidden: Tensor, logits: Tensor
    ) -> Tensor:
        """Return what each member descends on, (m,), and keep its mean loss."""
        front = len(inputs)
        targets = self._targets[step, :front]
        own = self._learner.loss(logits, targets).sum(1) / self.weights[step, :front]
        self.means[step, :front] = own.detach()
        if rule is None:
            return own
        extra = rule.penalty(Seen(inputs, Outputs(hidden, None, dense=logits), targets, slice(0, front)))
        return own if extra is None else own + extra


class MemberLearner(Learner):
    """Whatever a task trains: each member by itself, as the training loop does it, and one on every core.

    A member is computed by one thread, so that it ends alike whoever else is trained and wherever.

    Args:
        model: The architecture, with whatever of it is not trained.
        task: What is trained, and how it is measured.
        train: Its rows that are trained on.
    """

    def __init__(self, model: HeadedModel, task: Task, train: ExampleRows) -> None:
        self.task, self.train = task, train
        self.reason = f"task={task.slug} is trained a client on each core"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # A call puts parameters into a model for as long as it takes, so each that goes on needs its own.
        self._model, self._free = model, SimpleQueue[HeadedModel]()
        self._pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))

    def steps(self, batches: Batches) -> Steps:
        """See :class:`Learner`."""
        return _MemberSteps(self, batches)

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
        count = _members(params)
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
        try:
            model = self._free.get_nowait()
        except Empty:
            model = deepcopy(self._model)
        try:
            return cast("Tensor", functional_call(model, params, (batch, objective)))
        finally:
            self._free.put(model)


class _MemberSteps(Steps):
    def __init__(self, learner: MemberLearner, batches: Batches) -> None:
        self._learner, self._batches = learner, batches
        self.means, self.weights = (torch.zeros(batches.counts.shape) for _ in range(2))

    def gradients(self, step: int, params: Stack, rule: LocalRule | None) -> Sequence[Tensor]:
        """See :class:`Steps`."""

        def of(place: int) -> tuple[Tensor, ...]:
            return self._of(step, place, member_of(params, place), rule)

        each = self._learner.each(of, range(_members(params)))
        return [torch.stack(of_members) for of_members in zip(*each, strict=True)]

    def _of(self, step: int, place: int, member: Member, rule: LocalRule | None) -> tuple[Tensor, ...]:
        """Return the gradients of one member."""
        leaves = {name: value.detach().requires_grad_() for name, value in member.items()}
        rows = self._batches.rows[step, place, : self._batches.counts[step, place]]
        batch = self._learner.train.batch(rows.numpy())
        objective = self._learner.task.objective
        counts = objective.counts(batch)

        def descended(outputs: Outputs, batch: Batch) -> Tensor:
            own = objective.total(objective(outputs, batch), counts)
            self.means[step, place] = own.detach()
            self.weights[step, place] = counts[0]
            alone = Outputs(outputs.hidden[None], outputs.head)
            seen = Seen(batch["inputs"][None], alone, batch["targets"][None], slice(place, place + 1))
            extra = rule.penalty(seen) if rule else None
            return own if extra is None else own + extra[0]

        whole = self._learner.called(leaves, batch, descended)
        return torch.autograd.grad(whole, list(leaves.values()), materialize_grads=True)


def _members(params: Stack) -> int:
    return len(next(iter(params.values())))


def _only(member: Member) -> Stack:
    return {name: value[None] for name, value in member.items()}
