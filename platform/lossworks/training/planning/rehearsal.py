"""A run's memory, followed through one step on tensors that have shapes and no values."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lossworks.adapters.torch_private import assumed_tensors, pretended_ranks
from lossworks.catalogue.registry import create
from lossworks.data.batch import Batch
from lossworks.errors import LossworksError, UserError, shortened
from lossworks.losses.objective import Objective
from lossworks.models import HeadedModel, Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.interface import Measure, Task
from lossworks.tasks.methods import Method, replaces_loss
from lossworks.tasks.registry import task_of
from lossworks.training.batches import largest_share
from lossworks.training.distributed.sharding import gradient_sync, mesh_of, prepare_model
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import AT_ONCE
from lossworks.training.measure.head_memory import own_head_peak
from lossworks.training.measure.memory import EXCHANGE, TensorMemory
from lossworks.training.optimizer import Optimizers, build_optimizers
from lossworks.training.roles import Roles
from lossworks.training.weights.adapters import equip
from lossworks.training.weights.start import companion_models, learnt_of_start

WEIGHTS, GRADIENTS, MOMENTS = "weights", "gradients", "optimiser state"
ACTIVATIONS, HEAD, COMPANIONS = "activations", "head", "companions"
DATA, BATCHES, COPY, OTHER = "data", "batches", "copy that a checkpoint is written from", "other"
PARTS = (WEIGHTS, GRADIENTS, MOMENTS, ACTIVATIONS, HEAD, EXCHANGE, COMPANIONS, DATA, BATCHES, COPY, OTHER)
"""What memory is put down to, in the order in which it is shown."""


@dataclass(frozen=True)
class Rehearsal:
    """What a run takes on the worker with the most rows.

    Attributes:
        parameters: Numbers that are trained, over all workers.
        peak: Bytes of tensors by part of :data:`PARTS`, when they are most.
        moment: When that is: in a training step, an evaluation, or the look at the head at the end.
        flops_per_unit: Floating-point operations of a training step a unit, or None if not known.
        units: Units of data a step, over all workers.
        checkpoint_bytes: Of one checkpoint's tensors, over all workers.
    """

    parameters: int
    peak: Mapping[str, int]
    moment: str
    flops_per_unit: float | None
    units: int
    checkpoint_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Bytes of all tensors of a worker, when they are most."""
        return sum(self.peak.values())


def rehearse(spec: RunSpec) -> Rehearsal:
    """Take one step of a run on tensors without values, and follow what is alive.

    The model, its sharding, the objective, the optimiser and the evaluation are those of the run itself, and
    so is every tensor that they make. What operators take and give back inside themselves is not seen, nor
    are telemetry, analyses and what methods do besides their loss. Blocks are not compiled.

    Args:
        spec: The run; its data are read if the shapes of its batches are not in the spec. With
            ``micro_batch_size=auto`` a worker takes all its rows at once.

    Raises:
        UserError: The data can't be read, the model doesn't fit them, or something in the run looks at values
            in a way that can't be answered without them.
    """
    spec = spec.model_copy(update={"compile": False})
    task = task_of(spec).open_blank(spec, learnt_of_start(spec))
    companions = companion_models(spec)  # read before tensors have no values any more
    alone = spec.workers == 1 and spec.sharding.kind != "fsdp"
    try:
        with nullcontext() if alone else pretended_ranks(spec.workers):
            return _Stage(spec, task, World(0, spec.workers, torch.device("cpu")), companions).play()
    except LossworksError:
        raise
    except Exception as error:  # anything may happen to code that looks at values which aren't there
        raise UserError(
            f"loss {' + '.join(spec.loss.titles)}, task={task.slug}: can't be followed without values: "
            f"{shortened(' '.join(str(error).split()) or type(error).__name__)}"
        ) from error


class _Stage:
    """One worker's part of a run, on tensors without values."""

    def __init__(
        self, spec: RunSpec, task: Task, world: World, companions: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.spec, self.task, self.world, self.companions = spec, task, world, companions
        self.memory = TensorMemory()
        self.mesh = mesh_of(spec, world)
        self.replicated = self.mesh is None and world.size > 1
        self.bf16 = spec.precision == "bf16"
        methods: list[Method] = [create(one.name, **one.hyperparameters) for one in spec.methods]
        self.method = next((method for method in methods if replaces_loss(method)), None)
        self.peaks: dict[str, dict[str, int]] = {}

    def play(self) -> Rehearsal:
        """Build everything, take a step and evaluate."""
        with assumed_tensors(), self.memory:
            with self.memory.labelled(WEIGHTS):
                model = self._build()
            flops, parameters = self.task.flops_per_unit(model), _numbers(model)
            with self.memory.labelled(COMPANIONS):
                self.roles = Roles(self.spec, self.task, model, self.world, self.mesh, self._companion)
            with self.memory.labelled(WEIGHTS):
                prepare_model(model, self.spec, self.mesh)
            optimizers = build_optimizers(model, self.spec.optimizer)
            self._train(model, optimizers)
            self._evaluate(model)
            with self._moment("look at the head after the last step"), self.memory.labelled(HEAD):
                own_head_peak(self.task, model, self.world)
        moving = sum(role.ema is not None for role in self.spec.roles.values())
        # It stays from the first checkpoint on.
        copied = self.spec.checkpoint.background and self.spec.steps > self.spec.checkpoint.every
        for parts in self.peaks.values():
            parts[DATA] = self.task.data_bytes
            if copied:
                parts[COPY] = (1 + moving) * parts[WEIGHTS] + parts.get(MOMENTS, 0)
        moment = max(self.peaks, key=lambda name: sum(self.peaks[name].values()))
        return Rehearsal(
            parameters=parameters,
            peak={part: self.peaks[moment][part] for part in PARTS if self.peaks[moment].get(part)},
            moment=moment,
            flops_per_unit=flops,
            units=self.spec.batch_size * self.task.units_per_row,
            checkpoint_bytes=(1 + moving) * 4 * parameters + _state_bytes(optimizers),
        )

    def _companion(self, name: str, field: str, task: Task) -> HeadedModel:
        """Return a companion of the right shapes; see :class:`Roles`."""
        del field
        return task.build_companion(self.companions[name], empty=True)

    def _build(self) -> HeadedModel:
        model = self.task.empty_model()
        # Anew, or its parameters would have values.
        self.task.objective = Objective(self.spec.loss)
        equip(model, self.spec, self.task.objective)
        return model.train()

    def _train(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Take a first step, which makes the optimiser's state, and follow a second one."""
        with self.memory.labelled(MOMENTS):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        self._follow_gradients(model)
        share = self.task.order().largest_share(self.world.size)
        sizes = _sizes(share, self.spec.rows_at_once)
        with self._moment("training step"):
            with self.memory.labelled(BATCHES):
                batches = [self._batch(size) for size in sizes]
            # From the second one on, gradients are there to be added to, and each is as the one before.
            for index in sorted({0, max(0, len(batches) - 2), len(batches) - 1}):
                self._descend(model, batches[index], last=index == len(batches) - 1)
            with self.memory.labelled(OTHER):
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.spec.optimizer.clip_norm or math.inf)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

    def _descend(self, model: nn.Module, batch: Batch, *, last: bool) -> None:
        """Take one micro-batch forward and backward."""
        self.synchronised = last
        with gradient_sync(model, enabled=last):
            with self.memory.labelled(ACTIVATIONS), self._autocast():
                batch, companions = self.roles.beside(batch)
                sums: Tensor = model(batch, self._within_head(companions, self._objective))
            with self.memory.labelled(ACTIVATIONS):
                (sums * torch.ones_like(sums)).sum().backward()

    def _objective(self, outputs: Outputs, batch: Batch) -> Tensor:
        found: Tensor = (
            self.task.objective(outputs, batch)
            if self.method is None
            else self.method.loss(outputs, batch, self.task.objective)
        )
        return found

    def _within_head(self, companions: Mapping[str, Outputs], measure: Measure) -> Measure:
        def labelled(outputs: Outputs, batch: Batch) -> Tensor:
            with self.memory.labelled(HEAD):
                return measure(outputs.with_roles(companions) if companions else outputs, batch)

        return labelled

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> None:
        rows = min(self.spec.evaluation.sequences, len(self.task.held_out))
        size = min(self.spec.rows_at_once or AT_ONCE, largest_share(rows, self.world))
        model.eval()
        with self._moment("evaluation"):
            with self.memory.labelled(BATCHES):
                batch = self._batch(size, held_out=True)
            with self.memory.labelled(ACTIVATIONS), self._autocast():
                batch, companions = self.roles.beside(batch)
                model(batch, self._within_head(companions, self.task.measured))
        if isinstance(model, FSDPModule):
            model.reshard()

    def _follow_gradients(self, model: nn.Module) -> None:
        """Put gradients down as such, and keep DDP's buckets, which hold all of them between workers.

        DDP keeps its buckets over all steps; a gradient is copied there as soon as it is whole, and is a view
        of its bucket from then on. Until the last micro-batch it is a tensor of its own, beside them.
        """
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            with self.memory.labelled(EXCHANGE):
                bucket = torch.empty_like(parameter) if self.replicated else None

            def finished(parameter: Tensor, bucket: Tensor | None = bucket) -> None:
                if bucket is not None and self.synchronised:
                    parameter.grad = bucket
                elif parameter.grad is not None:
                    self.memory.relabel(parameter.grad, GRADIENTS)

            parameter.register_post_accumulate_grad_hook(finished)

    def _batch(self, rows: int, *, held_out: bool = False) -> Batch:
        data = self.task.held_out if held_out else self.task.train
        example = data.batch(np.zeros(1, dtype=np.int64))
        return {
            name: torch.empty((rows, *value.shape[1:]), dtype=value.dtype) for name, value in example.items()
        }

    def _autocast(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def _moment(self, name: str) -> Iterator[None]:
        """Keep what was alive when most was, inside."""
        self.memory.forget_peak()
        yield
        self.peaks[name] = dict(self.memory.peak)


def _sizes(share: int, micro_batch_size: int | None) -> list[int]:
    """Return the rows of each micro-batch of a worker's share."""
    size = micro_batch_size or share
    return [min(size, share - start) for start in range(0, share, size)]


def _state_bytes(optimizers: Optimizers) -> int:
    """Return the bytes of what optimisers keep, over all workers."""
    kept = (value for one in optimizers for state in one.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in kept if isinstance(value, Tensor))


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
