"""Many training runs of classifiers at once, each with the result it has alone under ``lossworks train``.

M runs of one architecture on one kind of data; they may differ in loss, optimiser, schedule and seed, and
stand at different steps. B examples a step, K classes.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lossworks.cohort import Member, Stack, StackedModel, stack
from lossworks.data import BagOrder, load_examples
from lossworks.losses import Loss, RowLoss, create, declaration
from lossworks.losses.interface import of_members
from lossworks.metrics import class_sums
from lossworks.models import build_classifier
from lossworks.specs import AnyTrainSpec, ClassifierSpec
from lossworks.training.batches import IGNORE_INDEX
from lossworks.training.evaluation import AT_ONCE, spaced
from lossworks.training.schedule import lr_factor

_MAY_DIFFER = ("name", "seed", "loss", "optimizer", "schedule", "tracking", "storage", "checkpoint")
_EXAMPLES_AT_ONCE = 2**17  # of runs that are evaluated together


def obstacle(spec: AnyTrainSpec) -> str | None:
    """Return why a run can't be packed with others, or None."""
    if not isinstance(spec, ClassifierSpec):
        return "language models fill a worker each"
    whole_batch = "whole-batch" in declaration(spec.loss.name).flags
    split = spec.workers > 1 or spec.micro_batch_size is not None
    reasons = {
        "GPUs are asked for": spec.resources_per_worker.get("GPU", 0) > 0,
        f"model.dropout={spec.model.dropout} draws random numbers": spec.model.dropout > 0,
        f"precision={spec.precision}": spec.precision != "fp32",
        "neural_collapse is measured": spec.neural_collapse,
        "telemetry is asked for": bool(spec.telemetry.every or spec.telemetry.spike),
        f"loss.name={spec.loss.name} is of whole batches, which workers or micro_batch_size split": (
            whole_batch and split
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def alike(spec: ClassifierSpec) -> str:
    """Return what runs must have in common to be packed together."""
    return spec.model_dump_json(exclude=set(_MAY_DIFFER))


@dataclass(frozen=True, eq=False)
class _Data:
    """What the runs of one seed read; see :class:`lossworks.data.examples.ExampleData`."""

    inputs: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    order: BagOrder
    model: StackedModel
    initial: Member


@lru_cache(maxsize=64)
def _data_of(common: str, seed: int) -> _Data:
    spec = ClassifierSpec.model_validate_json(common)
    data = load_examples(spec.data, seed)
    chosen = torch.from_numpy(spaced(spec.evaluation.sequences, len(data.held_out)))
    model = build_classifier(spec.model, shape=data.shape, classes=len(data.names), seed=seed)
    return _Data(
        data.train.inputs,
        data.train.labels,
        data.held_out.inputs[chosen],
        data.held_out.labels[chosen],
        BagOrder(len(data.train), spec.data.bag_size, spec.batch_size, seed),
        StackedModel(model),
        {name: value.detach() for name, value in model.named_parameters()},
    )


@dataclass(eq=False)
class PackedRun:
    """One run, and where it stands.

    Attributes:
        spec: The run.
        step: Steps taken.
        tensors: Parameters and AdamW's two moments, by ``params``, ``first`` and ``second`` and name.
        common: What it has in common with those it may be packed with.
    """

    spec: ClassifierSpec
    step: int
    tensors: dict[str, Member]
    common: str = field(init=False)

    def __post_init__(self) -> None:
        self.common = alike(self.spec)

    @classmethod
    def start(cls, spec: ClassifierSpec) -> Self:
        """Return a run before its first step.

        Raises:
            UserError: Its data can't be read, or its model doesn't fit them.
        """
        params = _data_of(alike(spec), spec.seed).initial
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        return cls(spec, 0, {"params": params, "first": zeros, "second": zeros})

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
class Report:
    """What a run has reached.

    Attributes:
        step: The step.
        metrics: As ``lossworks train`` tracks them at that step.
        failure: Why it can't go on, if it can't.
    """

    step: int
    metrics: dict[str, float]
    failure: str | None = None


def advance(runs: Sequence[PackedRun], steps: int) -> list[Report]:
    """Take steps with all runs at once and evaluate them; what they keep is moved on.

    A run that becomes non-finite disturbs no other, and is reported as failed.

    Args:
        runs: At least one, alike; see :func:`alike`.
        steps: How many, at least one; no run may have fewer left.
    """
    order = sorted(range(len(runs)), key=lambda index: _kind_of_loss(runs[index]))
    pack = _Pack([runs[index] for index in order])
    # Where a loss has next to no gradient, AdamW's second moments become denormal numbers, which processors
    # take many times as long for.
    torch.set_flush_denormal(True)
    try:
        reports = pack.advance(steps)
    finally:
        torch.set_flush_denormal(False)
    return [reports[order.index(index)] for index in range(len(runs))]


def _kind_of_loss(run: PackedRun) -> str:
    """Return what runs have in common whose losses are taken together."""
    loss = _loss(run)
    settings = loss.settings()
    for name in loss.per_row if isinstance(loss, RowLoss) else ():
        settings.pop(name)
    return f"{loss.slug} {settings}"


def _loss(run: PackedRun) -> Loss:
    spec = run.spec.loss
    of_rows = declaration(spec.name).kind == "row"
    found: Loss = create(
        spec.name,
        reduction="none" if of_rows else "mean",
        ignore_index=IGNORE_INDEX,
        **spec.hyperparameters,
    )
    return found


class _Pack:
    """Runs with their tensors stacked, those whose losses are taken together side by side."""

    def __init__(self, runs: Sequence[PackedRun]) -> None:
        self._runs = runs
        self._model = runs[0].data.model
        self._params, self._first, self._second = (
            stack([run.tensors[kind] for run in runs]) for kind in ("params", "first", "second")
        )
        self._losses = [_loss(run) for run in runs]
        self._together = list(_taken_together(runs, self._losses))
        self._adamw = _AdamW(runs, self._params, self._first, self._second)
        clips = [run.spec.optimizer.clip_norm for run in runs]
        self._clip = torch.tensor([math.inf if clip is None else clip for clip in clips])

    def advance(self, steps: int) -> list[Report]:
        inputs, labels, rows = self._batches(steps)
        count = len(self._runs)
        losses, norms = torch.zeros(steps, count), torch.zeros(steps, count)
        targets = labels[rows]
        for step in range(steps):
            objective = partial(self._objective, targets[step], losses[step])
            gradients = self._model.gradients(self._params, inputs[rows[step]], objective)
            with torch.no_grad():
                norms[step] = self._clipped(gradients)
                self._adamw.step(gradients)
        for index, run in enumerate(self._runs):
            run.step += steps
            stacks = {"params": self._params, "first": self._first, "second": self._second}
            run.tensors = {
                kind: {name: value[index] for name, value in of.items()} for kind, of in stacks.items()
            }
        measured = self._evaluated()
        return [
            self._report(index, losses[:, index], norms[:, index], measured[index]) for index in range(count)
        ]

    def _batches(self, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the examples of all seeds, and which each run takes at each step, (T, M, B)."""
        seeds = {run.spec.seed: run.data for run in self._runs}
        starts = dict(
            zip(seeds, np.cumsum([0, *(len(data.labels) for data in seeds.values())]), strict=False)
        )
        places: dict[tuple[int, int], np.ndarray] = {}  # of one seed at one step, which many runs share
        for run in self._runs:
            key = run.spec.seed, run.step
            if key not in places:
                size, first = run.spec.batch_size, run.step * run.spec.batch_size
                own = [run.data.order.rows(first + step * size, 0, 1) for step in range(steps)]
                places[key] = np.stack(own) + starts[run.spec.seed]
        rows = [places[run.spec.seed, run.step] for run in self._runs]
        inputs, labels = (
            torch.cat([getattr(data, name) for data in seeds.values()]) for name in ("inputs", "labels")
        )
        return inputs, labels, torch.from_numpy(np.stack(rows, axis=1))

    def _objective(self, targets: Tensor, kept: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
        """Return each run's mean loss (M,) of logits (M, B, K), and keep it."""
        del hidden
        parts = []
        for loss, place in self._together:
            if isinstance(loss, RowLoss):
                parts.append(loss(logits[place], targets[place]).mean(1))
            else:
                parts += [loss(*one)[None] for one in zip(logits[place], targets[place], strict=True)]
        found = torch.cat(parts)
        kept.copy_(found.detach())
        return found

    def _clipped(self, gradients: Sequence[Tensor]) -> Tensor:
        """Scale the gradients of each run to its largest norm, in place; return the norms before (M,)."""
        each = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]
        norms = torch.linalg.vector_norm(torch.stack(each), dim=0)
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
            at_once = max(1, _EXAMPLES_AT_ONCE // len(data.held_out))
            for start in range(0, len(indices), at_once):
                some = indices[start : start + at_once]
                params = {name: value[some] for name, value in self._params.items()}
                _, logits = self._model(params, data.held_out.expand(len(some), *data.held_out.shape))
                for index, z in zip(some, logits, strict=True):
                    found[index] = self._measured(index, z, data.held_out_labels)
        return [found[index] for index in range(len(self._runs))]

    def _measured(self, index: int, logits: Tensor, labels: Tensor) -> dict[str, float]:
        loss = self._losses[index]
        if isinstance(loss, RowLoss):
            own = float(loss(logits, labels).double().mean())
        else:  # a mean over what the training loop takes at once
            parts = zip(logits.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
            own = float(np.mean([float(loss(z, y)) for z, y in parts]))
        yardsticks = class_sums(logits, labels).metrics()
        return {"eval/loss": own, **{f"eval/{name}": value for name, value in yardsticks.items()}}

    def _report(self, index: int, losses: Tensor, norms: Tensor, measured: dict[str, float]) -> Report:
        run = self._runs[index]
        for what, values in (("loss", losses), ("gradient", norms)):
            bad = values.isfinite().logical_not().nonzero()
            if len(bad):
                step = run.step - len(values) + int(bad[0]) + 1
                return Report(step, {}, f"the {what} became NaN or infinite at step {step}")
        train = {
            "train/loss": float(losses[-1]),
            "train/grad_norm": float(norms[-1]),
            "train/lr": _lr(run, run.step),
        }
        return Report(run.step, train | measured)


def _lr(run: PackedRun, step: int) -> float:
    return run.spec.optimizer.lr * lr_factor(run.spec.schedule, step=step, steps=run.spec.steps)


def _taken_together(runs: Sequence[PackedRun], losses: Sequence[Loss]) -> Iterator[tuple[Loss, slice]]:
    """Yield a loss for each row of runs that it serves."""
    for _, group in groupby(range(len(runs)), key=lambda index: _kind_of_loss(runs[index])):
        places = list(group)
        own = [loss for index in places if isinstance(loss := losses[index], RowLoss)]
        yield of_members(own) if own else losses[places[0]], slice(places[0], places[-1] + 1)


@dataclass(eq=False)
class _Alike:
    """Parameters of all runs whose steps are alike: matrices, which decay, or others."""

    run: PackedRun
    step: Tensor
    decay: float
    params: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    places: list[tuple[int, int]]  # parameter and run, in the same order


def _by_decay(params: Stack, decay: float) -> list[list[int]]:
    """Return which parameters decay alike: matrices, and others, which don't."""
    matrices = [place for place, value in enumerate(params.values()) if value.dim() > 2]
    others = [place for place, value in enumerate(params.values()) if value.dim() <= 2]
    return [part for part in (matrices, others) if part] if decay else [[*matrices, *others]]


class _AdamW:
    """torch's fused AdamW on stacks, with hyperparameters of each run.

    It reads and writes a parameter and its moments once a step, where separate operations would take ten
    passes; for small models at many runs these would be most of the time.
    """

    def __init__(self, runs: Sequence[PackedRun], params: Stack, first: Stack, second: Stack) -> None:
        self._groups: list[_Alike] = []
        views = {name: [of[name].unbind(0) for of in (params, first, second)] for name in params}
        names = list(params)
        by_step: dict[object, list[int]] = defaultdict(list)
        for index, run in enumerate(runs):
            by_step[run.spec.optimizer, run.spec.schedule, run.step].append(index)
        for indices in by_step.values():
            run = runs[indices[0]]
            decay = run.spec.optimizer.weight_decay
            for parts in _by_decay(params, decay):
                places = [(place, index) for place in parts for index in indices]
                columns = [[views[names[p]][kind][i] for p, i in places] for kind in range(3)]
                own = decay if params[names[parts[0]]].dim() > 2 else 0.0
                step = torch.tensor(float(run.step))
                self._groups.append(_Alike(run, step, own, columns[0], columns[1], columns[2], places))

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move the parameters in place."""
        # The kernel reads memory in the parameter's order; those of convolutions come in others.
        views = [gradient.contiguous().unbind(0) for gradient in gradients]
        for group in self._groups:
            group.step += 1
            optimizer = group.run.spec.optimizer
            torch._fused_adamw_(
                group.params,
                [views[place][index] for place, index in group.places],
                group.first,
                group.second,
                [],
                [group.step] * len(group.places),
                lr=_lr(group.run, int(group.step)),
                beta1=optimizer.betas[0],
                beta2=optimizer.betas[1],
                weight_decay=group.decay,
                eps=optimizer.eps,
                amsgrad=False,
                maximize=False,
            )
