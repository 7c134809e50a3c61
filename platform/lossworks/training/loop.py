"""The training loop: plain torch, the same under any launcher."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from lossworks.catalogue.registry import create
from lossworks.data.batch import Batch, on
from lossworks.errors import LossSpikesError, NonFiniteLossError, RunError, StorageError
from lossworks.losses.objective import ElementLosses
from lossworks.models import Outputs
from lossworks.tasks.interface import Evaluation, ExampleRows, Measure
from lossworks.tasks.methods import Method, Trained, replaces_loss
from lossworks.tasks.registry import task_of
from lossworks.tensors import write_tensors
from lossworks.training.batches import micro_batches
from lossworks.training.checkpoints.checkpoint import tensors_in
from lossworks.training.checkpoints.manifest import Checkpoint
from lossworks.training.distributed.communication import time_communication
from lossworks.training.distributed.sharding import clip_gradients, distribute, gradient_sync, mesh_of
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import AT_ONCE, collected, evaluate
from lossworks.training.job import Job
from lossworks.training.measure import events
from lossworks.training.measure.finite import blame_gradient, refuse_non_finite
from lossworks.training.measure.hardware import Peak, peak_memory_bytes
from lossworks.training.measure.head_memory import measure_head_memory
from lossworks.training.measure.micro_batch_size import TriedSize, try_sizes, with_settled_size
from lossworks.training.measure.phases import PHASES, PhaseClock, shares
from lossworks.training.measure.profiling import StepProfiler
from lossworks.training.measure.speed import Speed
from lossworks.training.measure.telemetry import Telemetry
from lossworks.training.optimizer import as_set, build_optimizers, set_lr
from lossworks.training.outcome import Outcome, RunStatus
from lossworks.training.roles import Roles
from lossworks.training.schedule import lr_factor
from lossworks.training.weights.adapters import equip
from lossworks.training.weights.start import begin_from, trained_weights


def train(job: Job) -> Outcome:
    """Train as ``job.spec`` says, from the newest whole checkpoint if there is one.

    Every process of torch.distributed's default group calls this with an equal job; without a group it is a
    run in one process. All ranks return the same outcome.

    Raises:
        StorageError: A checkpoint can't be written.
    """
    if job.spec.micro_batch_size != "auto":
        return Trainer(job).run()
    job, found = with_settled_size(job, lambda trial: Trainer(trial).try_sizes())
    return Trainer(job, found).run()


def _copies(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of nested tensors by name."""
    return {
        name: _copies(value) if isinstance(value, Mapping) else value.detach().clone()
        for name, value in state.items()
    }


@torch.no_grad()
def _fill(state: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Put values into nested tensors by name, in place."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _fill(state[name], value)
        else:
            state[name].copy_(value)


@dataclass(frozen=True)
class _Step:
    """What one optimiser step gave: metrics, units of data over all ranks, whether to stop after it."""

    metrics: dict[str, float]
    units: float
    stop: bool


@dataclass(frozen=True)
class _Saving:
    """A checkpoint that is being written: of which step, and since when (``time.perf_counter``)."""

    future: "Future[Path]"
    step: int
    began: float


class Trainer:
    """One process's part of a run: model, optimiser, data and where they stand.

    Args:
        job: What it takes part in; a number of rows, or all, are taken at once.
        found: What was measured before, by tracked name; it is recorded with each evaluation.
    """

    def __init__(self, job: Job, found: Mapping[str, float] | None = None) -> None:
        spec = job.spec
        self.job, self.spec, self.world = job, spec, World.current()
        self.task = task_of(spec).open(spec, job.prepared, job.learnt)
        self.order = self.task.order()
        model = self.task.build_model()
        if spec.start is not None:
            begin_from(trained_weights(spec.start, "start"), model)
        mesh = mesh_of(spec, self.world)
        self.roles = Roles(spec, self.task, model, self.world, mesh)
        equip(model, spec, self.task.objective)
        self.headed_model = model
        self.methods: list[Method] = [create(one.name, **one.hyperparameters) for one in spec.methods]
        for method in self.methods:
            method.fit_to(self.task, model)
        self.bf16 = spec.precision == "bf16"
        flops, peak = self.task.flops_per_unit(model), Peak.of(self.world, bf16=self.bf16)
        self.speed = Speed(self.task.unit, flops, peak)
        self.model = distribute(model, spec, self.world, mesh)
        self.clock = PhaseClock.on(self.world.device)
        time_communication(self.model, self.clock, self.world.device)
        self.objective = self.clock.within("head", self._descended)
        self.profiler = StepProfiler(
            spec.profile, job.profile if self.world.leads else None, self.clock, job.notify
        )
        self.optimizers = build_optimizers(self.model, spec.optimizer)
        losses = ElementLosses(self.task.objective)
        self.telemetry = Telemetry(
            spec.telemetry, losses, self.world, bf16=self.bf16, completed=self.roles.beside
        )
        self.analyses = [create(analysis.name, **analysis.hyperparameters) for analysis in spec.analyses]
        self._found = dict(found or {})
        self._companions: dict[str, Outputs] = {}
        self._start: dict[str, Any] | None = None  # what a rollback without a checkpoint goes back to
        self.step, self.position = 0, 0
        self.metrics: dict[str, float] = {}
        self.evaluation: Evaluation | None = None  # the last
        self.held_out_loss = math.nan  # of this very step, or it would pass for a checkpoint's
        self.checkpoint: Path | None = None  # the last that is whole
        self._beside = self.world.apart() if spec.checkpoint.background else None
        self._saving: _Saving | None = None

    def run(self) -> Outcome:
        """Take all the steps that are left and say how it ended."""
        events.started(self.spec, self.world, self.speed.peak)
        self.clock.start()
        if self.spec.telemetry.spike.action == "rollback":
            self._start = _copies(self._weights())
        self._restore()
        self.model.train()
        self._begin()
        try:
            status, reason = self._train()
            self._await_saved()
        finally:
            self.profiler.close()
        if status == "finished" and self.step < self.spec.steps and self.world.leads:
            # Whoever compares runs looks at the last step; nothing has changed up to it.
            self.job.record(self.spec.steps, self.metrics)
        if status == "finished" and self.methods:
            self._finish_methods()
        return self._outcome(status, reason)

    def _begin(self) -> None:
        """Let methods look at what training begins with, or goes on with."""
        for method in self.methods:
            method.start(self.task, self.model)

    def _finish_methods(self) -> None:
        """Let methods do what follows training, and keep what they made and found."""
        size = self.spec.rows_at_once or AT_ONCE

        def over(measure: Measure, data: ExampleRows, rows: np.ndarray) -> Tensor:
            return collected(self.model, measure, data, rows, self.world, size=size, bf16=self.bf16)

        found: dict[str, float] = {}
        for method in self.methods:
            found |= method.finish(Trained(self.task, over)).figures
            if self.world.leads and self.job.results is not None and (made := method.result()):
                self.job.results.mkdir(exist_ok=True)
                write_tensors(self.job.results / f"{method.slug}.safetensors", made)
        self.metrics |= found
        if self.world.leads and found:
            self.job.record(self.spec.steps, found)

    def _train(self) -> tuple[RunStatus, str]:
        """Take steps to the end and return what that was, with a sentence about it."""
        while self.step < self.spec.steps and not self._ended:
            try:
                with self.profiler.step(self.step + 1):
                    stop = self._advance()
            except (NonFiniteLossError, LossSpikesError) as error:
                self._await_saved()
                ranks = error.ranks if isinstance(error, NonFiniteLossError) else ()
                events.diverged(error.step, ranks, str(error))
                return "diverged", f"{error}; {self._last_good()}"
            if stop:
                events.stopping(self.step)
                self._save()
                return "stopped", f"stopped on request after step {self.step}"
        return "finished", ""

    @property
    def _ended(self) -> bool:
        """Whether a method has nothing left to do, on all ranks alike."""
        return any(method.ended for method in self.methods)

    def _advance(self) -> bool:
        """Take one step with what is due after it, or leave a batch out; return whether to stop early."""
        started = time.perf_counter()
        done = self._train_step(self.step + 1)
        self.position += self.spec.batch_size
        if done is None:
            self.clock.settle()
            return False
        self.step += 1
        row = done.metrics | self.speed.metrics(done.units, time.perf_counter() - started)
        self.clock.settle()
        last = self.step == self.spec.steps or self._ended
        save = last or self.step % self.spec.checkpoint.every == 0
        self.held_out_loss = math.nan
        if save or self.step % self.spec.evaluation.every == 0:
            evaluation = self._evaluate()
            self.held_out_loss, self.evaluation = evaluation.loss, evaluation
            row |= evaluation.metrics() | self._lap() | self._of_companions() | self._found
            events.evaluated(self.step, evaluation.metrics())
        self.metrics |= row
        self.job.watch(self.step, {"train/peak_memory_bytes": float(peak_memory_bytes(self.world.device))})
        if self.world.leads:
            self.job.record(self.step, row)
        if save:
            self._save()
        return done.stop and not last

    def _train_step(self, step: int) -> "_Step | None":
        """Take optimiser step ``step`` (from 1) and return its metrics; None if its batch was left out.

        Raises:
            NonFiniteLossError: On every rank alike, before the parameters change.
            LossSpikesError: On every rank alike, before the parameters change.
        """
        world, spec = self.world, self.spec
        undo = self._undoing() if spec.telemetry.spike.leaves_out else None
        # Noise is a function of seed, step and rank, so that resuming has nothing to restore.
        torch.manual_seed(int(np.random.SeedSequence([spec.seed, step, world.rank]).generate_state(1)[0]))
        rows = self.order.rows(self.position, world.rank, world.size)
        objective, terms = self.task.objective, len(self.task.objective.titles)
        batches, (*counts, units, further) = self._counted(
            rows, step, size=spec.rows_at_once, share=self.order.largest_share(world.size)
        )
        sums = self._accumulate(batches, counts)
        stop = float(world.leads and self.job.stop_requested())
        failed = float(self._saved_in_vain())
        ranks = self._gather([*sums.tolist(), failed, stop, peak_memory_bytes(world.device)])
        of_ranks = ranks[:, :-3]
        self._await_failed(ranks[:, -3])
        if undo is None:
            self._refuse_non_finite(step, of_ranks)
        total = of_ranks.sum(dim=0)
        loss, parts = objective.value(total, counts)
        # A value of sums that are not finite may be finite, such as a quotient of them.
        seen = self.telemetry.look(
            step,
            loss if bool(of_ranks.isfinite().all()) else math.nan,
            self.model,
            batches,
            rows % len(self.task.train),  # an order of visits has the epoch in its numbers, too
        )
        complaint = seen.complaint
        if undo is not None and seen.left_out:
            complaint = f"{complaint}; {undo()}"
        if complaint and world.leads:
            events.complained(step, complaint)
            self.job.notify(complaint)
        if seen.left_out:
            return None
        factor = lr_factor(spec.schedule, step=step, steps=spec.steps)
        with self.clock("optimizer"):
            for method in self.methods:
                method.gradients(self.model, step)
            norm = clip_gradients(self.model, spec.optimizer.clip_norm)
            if not math.isfinite(norm):
                blame_gradient(self.model, step, world)
            set_lr(self.optimizers, factor)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.roles.follow(self.model)
            objective.advance(total)
            for method in self.methods:
                method.after_step(self.model, step)
        metrics = {
            **self.task.train_metrics(loss, units, further),
            **({f"train/loss/{title}": value for title, value in parts.items()} if terms > 1 else {}),
            "train/grad_norm": norm,
            "train/lr": spec.optimizer.lr * factor,
            "train/peak_memory_bytes": float(ranks[:, -1].max()),
            **seen.metrics,
        }
        return _Step(metrics, units, stop=bool(ranks[0, -2]))

    def _counted(
        self, rows: np.ndarray, step: int, *, size: int | None, share: int
    ) -> tuple[list[Batch], list[float]]:
        """Return this rank's micro-batches of a step, and what objective and task count over all ranks.

        Args:
            rows: Of this rank.
            step: From 1.
            size: Rows a micro-batch; None for all at once.
            share: The most rows that a rank has.

        Returns:
            The batches, and T counts of the objective's terms with two of the task behind them.
        """
        with self.clock("data"):
            batches = list(micro_batches(self.task.train, rows, size=size, largest_share=share))
            for method in self.methods:
                batches = [method.batch(batch, step) for batch in batches]
            self.task.objective.begin(step)
            own = [(*self.task.objective.counts(batch), *self.task.counts(batch)) for batch in batches]
        counts: list[float] = self._gather([sum(c) for c in zip(*own, strict=True)]).sum(dim=0).tolist()
        return batches, counts

    def try_sizes(self) -> list[TriedSize]:
        """Return what taking so many rows at once costs, size by size; this is not to be trained any more."""
        self.model.train()
        self._begin()
        # The optimisers' state takes memory from the first step on.
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        for optimizer in self.optimizers:
            optimizer.step()
        self._drop_gradients()
        share = self.order.largest_share(self.world.size)
        return try_sizes(self.spec, self._descend_and_drop, share, self.world)

    def _descend_and_drop(self, size: int, count: int) -> None:
        """Take so many micro-batches of the first step forward and backward, as a step does, for nothing."""
        share = min(size * count, self.order.largest_share(self.world.size))
        # Alike on every rank: one that had less memory left than the others would keep them waiting.
        rows = np.resize(self.order.rows(0, self.world.rank, self.world.size), share)
        batches, (*counts, _, _) = self._counted(rows, 1, size=size, share=share)
        self._accumulate(batches, counts)
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _accumulate(self, batches: list[Batch], counts: list[float]) -> Tensor:
        """Run all micro-batches forward and backward; return this rank's sums (S,) of the objective.

        Where a loss is a function of sums over the whole batch, they are taken first, in a pass without
        gradients; the second pass then descends on each sum times the derivative at the total.
        """
        device, objective = self.world.device, self.task.objective
        before = self._sums_without_gradient(batches) if objective.two_passes else torch.empty(0)
        # Both DDP and FSDP average over ranks; the loss is to be a sum over them, divided once.
        slopes = objective.slopes(before, counts, scale=self.world.size).to(device)
        total = torch.zeros((), device=device)
        for index, batch in enumerate(batches):
            with gradient_sync(self.model, enabled=index == len(batches) - 1):
                with self.clock("forward"):
                    sums = self._forward(batch)
                with self.clock("backward"):
                    (sums * slopes.to(sums.dtype)).sum().backward()
            total = total + sums.detach()
        return total

    def _sums_without_gradient(self, batches: list[Batch]) -> Tensor:
        """Return the objective's sums (S,) over all micro-batches and ranks."""
        total = torch.zeros((), device=self.world.device)
        with torch.no_grad(), self.clock("forward"):
            for batch in batches:
                total = total + self._forward(batch)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # a forward pass without a backward pass leaves the root's parameters whole
        return self._gather(total.tolist()).sum(dim=0)

    def _forward(self, batch: Batch) -> Tensor:
        """Return the sums (S,) of a micro-batch, through the distributed model."""
        device = self.world.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            batch, self._companions = self.roles.beside(batch)
            found: Tensor = self.model(on(device, batch), self.objective)
        return found

    def _descended(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the sums of the objective, or of the method that takes its place; inside the forward."""
        objective = self.task.objective
        if self._companions:
            outputs = outputs.with_roles(self._companions)
        own = next((method for method in self.methods if replaces_loss(method)), None)
        found: Tensor = objective(outputs, batch) if own is None else own.loss(outputs, batch, objective)
        return found

    def _undoing(self) -> Callable[[], str]:
        """Return what takes back what a batch changes before the update, and says so in words.

        Gradients go, and what losses and methods keep is as it was; or all is as at the newest checkpoint.
        """
        buffers = _copies(dict(self.model.named_buffers()))
        states = [_copies(method.state()) for method in self.methods]

        def undo() -> str:
            self._drop_gradients()
            if self.spec.telemetry.spike.action == "rollback":
                return self._go_back()
            _fill(dict(self.model.named_buffers()), buffers)
            for method, state in zip(self.methods, states, strict=True):
                method.load_state(state)
            return "its update is left out"

        return undo

    def _go_back(self) -> str:
        """Take weights, optimiser state and all else but the place in the data from an older checkpoint.

        It is that of the last step at which one is due, or else the start: checkpoints that an interruption
        made are passed over, so that a run that went on goes back as far as one that had no interruption.
        """
        due = self._last_due()
        self._await_saved()
        with self.clock("checkpoint"):
            checkpoint = self._newest(until=due)[0] if due else None
            if checkpoint is not None:
                self._load(checkpoint, left_out=False)
            elif self._start is None:
                where = self.job.checkpoints.folder
                raise RunError(f"telemetry.spike.action=rollback: no checkpoint in {where} to go back to")
            else:
                _fill(self._weights(), self._start)
                for method in self.methods:
                    method.load_state(_copies(self._start).get("methods", {}).get(method.slug, {}))
                for optimizer in self.optimizers:
                    optimizer.state.clear()
                self.telemetry.load_state({}, left_out=False)
        self._begin()
        self.step = checkpoint.step if checkpoint else 0
        return f"going back to {f'step {self.step}' if self.step else 'the start'}, and on behind its batch"

    def _refuse_non_finite(self, step: int, sums: Tensor) -> None:
        """Check the sums of every rank, shape (ranks, S), and name the term that is not finite."""
        if bool(sums.isfinite().all()):
            return
        objective = self.task.objective
        parts = sums.split(objective.sizes, dim=1)
        for title, part in zip(objective.titles, parts, strict=True):
            what = f"loss {title}" if len(objective.titles) > 1 else "loss"
            refuse_non_finite(what, step, part.sum(dim=1))

    def _gather(self, values: Sequence[float]) -> Tensor:
        """Gather numbers of all ranks, and count how long that takes."""
        with self.clock("communication"):
            return self.world.gather(values)

    def _lap(self) -> dict[str, float]:
        """Return where the time went since this was last asked, as shares; means over ranks."""
        seconds = self._mean_seconds(self.clock.lap())
        row = {f"time/{phase}": share for phase, share in shares(seconds).items()}
        return row | {
            "train/data_wait_seconds": seconds["data"],
            "train/checkpoint_seconds": seconds["checkpoint"],
        }

    def _of_companions(self) -> dict[str, float]:
        """Return what companions have taken so far, where there are any: seconds and bytes of a rank."""
        if not self.roles:
            return {}
        return {"companions/seconds": self.roles.seconds, "companions/bytes": self.roles.bytes}

    def _mean_seconds(self, own: dict[str, float]) -> dict[str, float]:
        mean = self.world.gather([own[phase] for phase in PHASES]).mean(dim=0)
        return dict(zip(PHASES, mean.tolist(), strict=True))

    def _evaluate(self) -> Evaluation:
        with self.clock("evaluation"):
            return evaluate(
                self.model,
                self.task,
                self.world,
                limit=self.spec.evaluation.sequences,
                micro_batch_size=self.spec.rows_at_once,
                bf16=self.bf16,
                analyses=self.analyses,
                completed=self.roles.beside,
            )

    def _save(self) -> None:
        """Write a checkpoint, or begin to: the next one, a stop and the end wait for it."""
        self._await_saved()
        if self.checkpoint is not None and self.checkpoint.name.endswith(f"{self.step:08d}"):
            return
        seen = self.telemetry.state()
        given: dict[str, Any] = {
            "step": self.step,
            "position": self.position,
            "held_out_loss": self.held_out_loss,
            "further": self._further() | ({"telemetry": seen} if seen else {}),
            "stays": self._last_due() if self.spec.telemetry.spike.action == "rollback" else None,
        }
        began, store = time.perf_counter(), self.job.checkpoints
        with self.clock("checkpoint"):
            if self._beside is None:
                self.checkpoint = store.save(self.model, self.optimizers, self.world, **given)
                events.saved(self.step, self.checkpoint, time.perf_counter() - began)
            else:
                future = store.save_meanwhile(self.model, self.optimizers, self._beside, **given)
                self._saving = _Saving(future, self.step, began)
        self._forget_start()

    def _saved_in_vain(self) -> bool:
        """Return whether this rank knows that the checkpoint being written failed; note one that is done."""
        if self._saving is None or not self._saving.future.done():
            return False
        if self._saving.future.exception() is not None:
            return True
        self._await_saved()
        return False

    def _await_failed(self, flags: Tensor) -> None:
        """Wait for the checkpoint that some rank's flag, shape (ranks,), says has failed: it does on all."""
        if bool(flags.any()):
            self._await_saved()

    def _await_saved(self) -> None:
        """Wait for the checkpoint that is being written while training goes on, if there is one.

        Raises:
            StorageError: It could not be written; on every rank.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        with self.clock("checkpoint"):
            self.checkpoint = saving.future.result()
        events.saved(saving.step, self.checkpoint, time.perf_counter() - saving.began)

    def _last_due(self) -> int:
        """Return the last step, up to the present one, at which a checkpoint is due; 0 for none."""
        return self.step - self.step % self.spec.checkpoint.every

    def _forget_start(self) -> None:
        """Drop the weights of the start as soon as no rollback can go there."""
        if self._last_due():
            self._start = None

    def _restore(self) -> None:
        """Go on from the newest whole checkpoint, the same one on every rank.

        Raises:
            StorageError: On every rank alike: there is a mirror, and it can't be read.
        """
        with self.clock("checkpoint"):
            checkpoint, complaints = self._newest()
            if checkpoint is not None:
                self._load(checkpoint)
        if checkpoint is not None:
            self.step, self.position = checkpoint.step, checkpoint.position
            self.checkpoint = checkpoint.folder
            self._forget_start()
            events.restored(self.step, checkpoint.folder)
        if self.world.leads and (checkpoint is not None or complaints):
            origin = f"step {self.step}" if checkpoint else "the start"
            text = "; ".join([*complaints, f"going on from {origin}"])
            if complaints:
                events.complained(self.step, text)
            self.job.notify(text)

    def _newest(self, until: int | None = None) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest whole checkpoint, and complaints about others, the same on every rank.

        Raises:
            StorageError: On every rank: the mirror can't be read.
        """
        found: tuple[Checkpoint | None, list[str]] | str | None = None
        if self.world.leads:
            try:
                found = self.job.checkpoints.newest(until)
            except StorageError as error:
                found = str(error)
        agreed: tuple[Checkpoint | None, list[str]] | str = self.world.agree(found)
        if isinstance(agreed, str):
            raise StorageError(agreed)
        return agreed

    def _load(self, checkpoint: Checkpoint, *, left_out: bool = True) -> None:
        """Take weights and states from a checkpoint, except for step and place in the data.

        Args:
            checkpoint: A whole one, the same on every rank.
            left_out: Whether it also says which batches were left out.
        """
        further = self._further()
        with as_set(self.optimizers):
            self.job.checkpoints.load(checkpoint, self.model, self.optimizers, further)
        for method in self.methods:
            method.load_state(further.get("methods", {}).get(method.slug, {}))
        if self.spec.telemetry.spike.height is not None:
            # A checkpoint of a run that looked at nothing, or of an older Lossworks, has no such state.
            self.telemetry.load_state(tensors_in(checkpoint.folder, "telemetry."), left_out=left_out)

    def _weights(self) -> dict[str, Any]:
        """Return the tensors of the model and of what else has a state, apart from the optimiser."""
        return {"model": get_model_state_dict(self.model), **self._further()}

    def _further(self) -> dict[str, Any]:
        """Return the tensors of what else has a state: moving companions, and methods."""
        companions = {name: get_model_state_dict(model) for name, model in self.roles.moving().items()}
        methods = {method.slug: state for method in self.methods if (state := method.state())}
        return ({"roles": companions} if companions else {}) | ({"methods": methods} if methods else {})

    def _last_good(self) -> str:
        if self.checkpoint is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.checkpoint}"

    def _outcome(self, status: RunStatus, reason: str) -> Outcome:
        seconds = self._mean_seconds(self.clock.total())
        events.ended(self.step, status, reason, seconds)
        best = self.job.checkpoints.best() if self.world.leads else None
        head_memory = measure_head_memory(self.task, self.headed_model, self.world)
        return Outcome(
            status=status,
            reason=reason,
            step=self.step,
            metrics=self.metrics,
            checkpoint=str(self.checkpoint) if self.checkpoint else None,
            best=self.world.agree(str(best.folder) if best else None),
            head_memory=self.world.agree(head_memory),
            pictured=self.evaluation.pictured if self.evaluation else {},
            seconds=seconds,
        )
