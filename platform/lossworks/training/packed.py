"""Many training runs of small models at once, each with the result it has alone under ``lossworks train``.

M runs of one architecture on one kind of data; they may differ in loss, optimiser, schedule and seed, and
stand at different steps. B rows a step, K outputs.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import groupby
from typing import Self, cast

import numpy as np
import torch
from torch import Tensor

from lossworks.catalogue.registry import declaration
from lossworks.cohort import AdamWSettings, Member, ScheduledAdamW, StackedModel, stack
from lossworks.data import Order
from lossworks.data.order import spaced
from lossworks.losses import RowLoss
from lossworks.losses.interface import of_members
from lossworks.losses.objective import Objective
from lossworks.models import Outputs
from lossworks.specs import OptimizerSpec, RunSpec, ScheduleSpec
from lossworks.tasks.interface import Task
from lossworks.tasks.registry import parse_train_spec, task_of
from lossworks.training.schedule import lr_factor

_MAY_DIFFER = ("name", "seed", "loss", "optimizer", "schedule", "tracking", "storage", "checkpoint")
_EXAMPLES_AT_ONCE = 2**17  # of runs that are evaluated together


def obstacle(spec: RunSpec) -> str | None:
    """Return why a run can't be packed with others, or None."""
    drawing = [term.name for term in spec.loss.terms if "random" in declaration(term.name).flags]
    split = spec.workers > 1 or spec.micro_batch_size is not None
    further = [name for name in ("methods", "analyses", "roles", "start") if getattr(spec, name)]
    reasons = {
        "GPUs are asked for": spec.resources_per_worker.get("GPU", 0) > 0,
        f"precision={spec.precision}": spec.precision != "fp32",
        f"optimizer.kind={spec.optimizer.kind}, and runs at once take steps of adamw": (
            spec.optimizer.kind != "adamw"
        ),
        f"{', '.join(further)} is set": bool(further),
        "telemetry is asked for": spec.telemetry.looks,
        "lora or optimizer.only says what is trained": bool(spec.lora.rank or spec.optimizer.only),
        f"loss.name={', '.join(drawing)} draws random numbers for each part of a batch, and workers or "
        "micro_batch_size split batches": bool(drawing) and split,
    }
    found = task_of(spec).obstacle(spec) or next((why for why, holds in reasons.items() if holds), None)
    if found is None and Objective(spec.loss).learns:
        return f"loss.name={spec.loss.name} has parameters of its own"
    return found


def alike(spec: RunSpec) -> str:
    """Return what runs must have in common to be packed together, as the JSON of a spec."""
    values = spec.model_dump(mode="json", exclude=set(_MAY_DIFFER))
    # The loss may decide the width of the head, and what a batch holds; otherwise it is the task's usual one.
    shaping = json.loads(task_of(spec).shaping(spec))
    return json.dumps({**values, "loss": shaping} if shaping else values)


@dataclass(frozen=True, eq=False)
class _Data:
    """What the runs of one seed read.

    Attributes:
        task: Of the first of them; its objective is not used.
        train: All rows, by name.
        held_out: Those that an evaluation reads.
        order: In which training visits the rows.
        model: The architecture.
        initial: Parameters before the first step.
    """

    task: Task
    train: dict[str, Tensor]
    held_out: dict[str, Tensor]
    order: Order
    model: StackedModel
    initial: Member


@lru_cache(maxsize=64)
def _data_of(common: str, seed: int) -> _Data:
    spec = parse_train_spec({**json.loads(common), "seed": seed})
    task = task_of(spec).open(spec, None)
    model = task.build_model()
    return _Data(
        task,
        task.train.batch(np.arange(len(task.train))),
        task.held_out.batch(spaced(spec.evaluation.sequences, len(task.held_out))),
        task.order(),
        StackedModel(model),
        {name: value.detach() for name, value in model.named_parameters()},
    )


@dataclass(eq=False)
class PackedRun:
    """One run, and where it stands.

    Attributes:
        spec: The run.
        step: Steps taken.
        tensors: Parameters and AdamW's two moments, by ``params``, ``first`` and ``second`` and name, and the
            state of a loss that has one, by ``loss``.
        common: What it has in common with those it may be packed with.
    """

    spec: RunSpec
    step: int
    tensors: dict[str, Member]
    common: str = field(init=False)

    def __post_init__(self) -> None:
        self.common = alike(self.spec)

    @classmethod
    def start(cls, spec: RunSpec) -> Self:
        """Return a run before its first step.

        Raises:
            UserError: Its data can't be read, or its model doesn't fit them.
        """
        found = cls(spec, 0, {})
        params = found.data.initial
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        found.tensors = {"params": params, "first": zeros, "second": zeros}
        if state := found.objective.state_dict():
            found.tensors["loss"] = state
        return found

    @cached_property
    def objective(self) -> Objective:
        """What it trains, made once; its state is in ``tensors``."""
        return Objective(self.spec.loss)

    @property
    def data(self) -> _Data:
        """What it reads."""
        return _data_of(self.common, self.spec.seed)

    @property
    def until_report(self) -> int:
        """Steps to its next evaluation."""
        every, left = self.spec.evaluation.every, self.spec.steps - self.step
        return min(every - self.step % every, left)


@dataclass(frozen=True)
class PackedReport:
    """What a run has reached.

    Attributes:
        step: The step.
        metrics: As ``lossworks train`` tracks them at that step.
        failure: Why it can't go on, if it can't.
    """

    step: int
    metrics: dict[str, float]
    failure: str | None = None


def advance(
    runs: Sequence[PackedRun], steps: int, on_step: Callable[[int], None] = lambda _: None
) -> list[PackedReport]:
    """Take steps with all runs at once and evaluate them; what they keep is moved on.

    A run that becomes non-finite disturbs no other, and is reported as failed.

    Args:
        runs: At least one, alike; see :func:`alike`.
        steps: How many, at least one; no run may have fewer left.
        on_step: Called after each with how many have been taken.
    """
    objectives = [_objective_of(run) for run in runs]
    order = sorted(range(len(runs)), key=lambda index: _sharing(objectives[index]))
    pack = _Pack([runs[index] for index in order], [objectives[index] for index in order])
    # Where a loss has next to no gradient, AdamW's second moments become denormal numbers, which processors
    # take many times as long for.
    torch.set_flush_denormal(True)
    try:
        reports = pack.advance(steps, on_step)
    finally:
        torch.set_flush_denormal(False)
    return [reports[order.index(index)] for index in range(len(runs))]


def _objective_of(run: PackedRun) -> Objective:
    """Return a run's objective in the state in which the run left it."""
    objective = run.objective
    if "loss" in run.tensors:
        objective.load_state_dict({name: value.clone() for name, value in run.tensors["loss"].items()})
    return objective


def _sharing(objective: Objective) -> str:
    """Return what runs have in common whose losses are taken together."""
    kinds = []
    for loss in objective.terms:
        settings = loss.settings()
        for name in loss.per_row if isinstance(loss, RowLoss) else ():
            settings.pop(name)
        kinds.append(f"{loss.slug} {settings}")
    return " + ".join(kinds)


class _Together:
    """Runs that lie side by side and whose losses are taken at once, where they are losses of rows.

    Args:
        objectives: Theirs.
        place: Where they lie in the pack.
    """

    def __init__(self, objectives: Sequence[Objective], place: slice) -> None:
        self.objectives, self.place = objectives, place
        terms = [[objective.terms[at] for objective in objectives] for at in range(len(objectives[0].terms))]
        rows = all(isinstance(loss, RowLoss) and loss.kind == "row" for term in terms for loss in term)
        self._rows = (
            [of_members([cast("RowLoss", loss.with_reduction("none")) for loss in term]) for term in terms]
            if rows
            else []
        )

    def begin(self, steps: Sequence[int]) -> None:
        """Set the weights of the runs' next steps."""
        for objective, step in zip(self.objectives, steps, strict=True):
            objective.begin(step)

    def values(self, hidden: Tensor, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean losses (M,) of the runs for features (M, B, D), logits (M, B, K) and a batch."""
        if not self._rows:
            parts = [
                objective_value(
                    objective, hidden[at], logits[at], {name: value[at] for name, value in batch.items()}
                )
                for at, objective in enumerate(self.objectives)
            ]
            return torch.stack(parts)
        means: list[Tensor] = [loss(logits, batch["targets"]).mean(1) for loss in self._rows]
        if len(means) == 1 and all(objective.weights == (1.0,) for objective in self.objectives):
            return means[0]
        weights = logits.new_tensor([objective.weights for objective in self.objectives])
        return (torch.stack(means, 1) * weights).sum(1)


def objective_value(objective: Objective, hidden: Tensor, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the objective of one model's features (B, D) and logits (B, K), a differentiable scalar."""
    sums = objective(Outputs(hidden, None, dense=logits), batch)
    return objective.total(sums, objective.counts(batch))


class _Pack:
    """Runs with their tensors stacked, those whose losses are taken together side by side."""

    def __init__(self, runs: Sequence[PackedRun], objectives: Sequence[Objective]) -> None:
        self._runs, self._objectives = runs, objectives
        self._model = runs[0].data.model
        self._params, self._first, self._second = (
            stack([run.tensors[kind] for run in runs]) for kind in ("params", "first", "second")
        )
        self._together = list(_taken_together(objectives))
        members = [(_settings(run.spec.optimizer), _rate(run.spec), run.step) for run in runs]
        self._adamw = ScheduledAdamW(members, self._params, self._first, self._second)
        clips = [run.spec.optimizer.clip_norm for run in runs]
        self._clip = torch.tensor([math.inf if clip is None else clip for clip in clips])

    def advance(self, steps: int, on_step: Callable[[int], None]) -> list[PackedReport]:
        data, rows = self._batches(steps)
        count = len(self._runs)
        losses, norms = torch.zeros(steps, count), torch.zeros(steps, count)
        others = {name: value[rows] for name, value in data.items() if name != "inputs"}
        weighted = any(term.weight.final is not None for run in self._runs for term in run.spec.loss.terms)
        for step in range(steps):
            batch = {name: value[step] for name, value in others.items()}
            if weighted or step == 0:
                self._begin(step)

            objective = partial(self._kept, batch, losses[step])
            gradients = self._model.gradients(self._params, data["inputs"][rows[step]], objective)
            with torch.no_grad():
                norms[step] = self._clipped(gradients)
                self._adamw.step(gradients)
            on_step(step + 1)
        for index, (run, own) in enumerate(zip(self._runs, self._objectives, strict=True)):
            run.step += steps
            stacks = {"params": self._params, "first": self._first, "second": self._second}
            run.tensors = {
                kind: {name: value[index] for name, value in of.items()} for kind, of in stacks.items()
            }
            if state := own.state_dict():
                run.tensors["loss"] = state
        measured = self._evaluated()
        return [
            self._report(index, losses[:, index], norms[:, index], measured[index]) for index in range(count)
        ]

    def _kept(self, batch: dict[str, Tensor], kept: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
        """Return each run's mean loss (M,), and keep it."""
        found = self._values(hidden, logits, batch)
        kept.copy_(found.detach())
        return found

    def _begin(self, step: int) -> None:
        for together in self._together:
            runs = self._runs[together.place]
            together.begin([run.step + step + 1 for run in runs])

    def _batches(self, steps: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return the rows of all seeds, by name, and which each run takes at each step, (T, M, B)."""
        seeds = {run.spec.seed: run.data for run in self._runs}
        sizes = [len(data.train["inputs"]) for data in seeds.values()]
        starts = dict(zip(seeds, np.cumsum([0, *sizes]), strict=False))
        places: dict[tuple[int, int], np.ndarray] = {}  # of one seed at one step, which many runs share
        for run in self._runs:
            key = run.spec.seed, run.step
            if key not in places:
                size, first = run.spec.batch_size, run.step * run.spec.batch_size
                own = [run.data.order.rows(first + step * size, 0, 1) for step in range(steps)]
                places[key] = np.stack(own) + starts[run.spec.seed]
        rows = [places[run.spec.seed, run.step] for run in self._runs]
        names = self._runs[0].data.train
        together = {name: torch.cat([data.train[name] for data in seeds.values()]) for name in names}
        return together, torch.from_numpy(np.stack(rows, axis=1))

    def _values(self, hidden: Tensor, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Return each run's mean loss (M,)."""
        if len(self._together) == 1:
            return self._together[0].values(hidden, logits, batch)
        parts = []
        for together in self._together:
            own = {name: value[together.place] for name, value in batch.items()}
            parts.append(together.values(hidden[together.place], logits[together.place], own))
        return torch.cat(parts)

    def _clipped(self, gradients: Sequence[Tensor]) -> Tensor:
        """Scale the gradients of each run to its largest norm, in place; return the norms before (M,)."""
        each = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]
        norms: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
        factors = (self._clip / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        if bool((factors < 1.0).any()):
            for gradient in gradients:
                gradient.mul_(factors.reshape(-1, *[1] * (gradient.dim() - 1)))
        return norms

    @torch.no_grad()
    def _evaluated(self) -> list[dict[str, float]]:
        """Return what each run's evaluation measures."""
        found: dict[int, dict[str, float]] = {}
        by_seed: dict[int, list[int]] = defaultdict(list)
        for index, run in enumerate(self._runs):
            by_seed[run.spec.seed].append(index)
        for indices in by_seed.values():
            data = self._runs[indices[0]].data
            at_once = max(1, _EXAMPLES_AT_ONCE // len(data.held_out["inputs"]))
            for start in range(0, len(indices), at_once):
                some = indices[start : start + at_once]
                params = {name: value[some] for name, value in self._params.items()}
                inputs = data.held_out["inputs"]
                hidden, logits = self._model(params, inputs.expand(len(some), *inputs.shape))
                for index, h, z in zip(some, hidden, logits, strict=True):
                    found[index] = self._measured(index, h, z)
        return [found[index] for index in range(len(self._runs))]

    def _measured(self, index: int, hidden: Tensor, logits: Tensor) -> dict[str, float]:
        """Return what the task measures of one run's outputs for the held-out rows."""
        data, objective = self._runs[index].data, self._objectives[index]
        objective.eval()
        outputs = Outputs(hidden, None, dense=logits)
        own = objective(outputs, data.held_out)
        loss, _ = objective.value(own.double(), objective.counts(data.held_out))
        objective.train()
        yardsticks, _ = data.task.figures(data.task.measure(outputs, data.held_out, own))
        return {"eval/loss": loss, **yardsticks}

    def _report(self, index: int, losses: Tensor, norms: Tensor, measured: dict[str, float]) -> PackedReport:
        run = self._runs[index]
        for what, values in (("loss", losses), ("gradient", norms)):
            bad = values.isfinite().logical_not().nonzero()
            if len(bad):
                step = run.step - len(values) + int(bad[0]) + 1
                return PackedReport(step, {}, f"the {what} became NaN or infinite at step {step}")
        train = {
            "train/loss": float(losses[-1]),
            "train/grad_norm": float(norms[-1]),
            "train/lr": _rate(run.spec)(run.step),
        }
        return PackedReport(run.step, train | measured)


def _settings(spec: OptimizerSpec) -> AdamWSettings:
    return AdamWSettings(**spec.hyperparameters, weight_decay=spec.weight_decay)


@dataclass(frozen=True)
class _Rate:
    """The learning rate of a run at a step, counted from 1; equal runs have equal ones."""

    peak: float
    schedule: ScheduleSpec
    steps: int

    def __call__(self, step: int) -> float:
        return self.peak * lr_factor(self.schedule, step=step, steps=self.steps)


def _rate(spec: RunSpec) -> _Rate:
    return _Rate(spec.optimizer.lr, spec.schedule, spec.steps)


def _taken_together(objectives: Sequence[Objective]) -> Iterator[_Together]:
    """Yield runs whose losses are taken at once."""
    for _, group in groupby(range(len(objectives)), key=lambda index: _sharing(objectives[index])):
        places = list(group)
        yield _Together([objectives[place] for place in places], slice(places[0], places[-1] + 1))
