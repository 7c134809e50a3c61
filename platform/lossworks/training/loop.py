"""The training loop: plain torch, the same under any launcher."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lossworks.errors import NonFiniteLossError
from lossworks.training import events
from lossworks.training.batches import micro_batches
from lossworks.training.communication import time_communication
from lossworks.training.evaluation import evaluate
from lossworks.training.finite import blame_gradient, refuse_non_finite
from lossworks.training.hardware import Peak, peak_memory_bytes
from lossworks.training.head_memory import measure_head_memory
from lossworks.training.job import Job
from lossworks.training.objective import ElementLosses
from lossworks.training.optimizer import build_optimizer, set_lr
from lossworks.training.outcome import Outcome, Status
from lossworks.training.phases import PHASES, PhaseClock, shares
from lossworks.training.profiling import StepProfiler
from lossworks.training.schedule import lr_factor
from lossworks.training.sharding import clip_gradients, distribute, gradient_sync
from lossworks.training.speed import Speed
from lossworks.training.task import Evaluation, build_task
from lossworks.training.telemetry import Telemetry
from lossworks.training.world import World


def train(job: Job) -> Outcome:
    """Train as ``job.spec`` says, from the newest whole checkpoint if there is one.

    Every process of torch.distributed's default group calls this with an equal job; without a group it is a
    run in one process. All ranks return the same outcome.

    Raises:
        StorageError: A checkpoint can't be written.
    """
    return Trainer(job).run()


@dataclass(frozen=True)
class _Step:
    """What one optimiser step gave: metrics, units of data over all ranks, whether to stop after it."""

    metrics: dict[str, float]
    units: float
    stop: bool


class Trainer:
    """One process's part of a run: model, optimiser, data and where they stand."""

    def __init__(self, job: Job) -> None:
        spec = job.spec
        self.job, self.spec, self.world = job, spec, World.current()
        self.task = build_task(spec, job.corpus)
        self.order = self.task.order()
        model = self.task.build_model()
        self.headed_model = model
        self.bf16 = spec.precision == "bf16"
        flops, peak = self.task.flops_per_unit(model), Peak.of(self.world, bf16=self.bf16)
        self.speed = Speed(self.task.unit, flops, peak)
        self.model = distribute(model, spec, self.world)
        self.clock = PhaseClock.on(self.world.device)
        time_communication(self.model, self.clock, self.world.device)
        self.objective = self.clock.within("head", self.task.objective)
        self.profiler = StepProfiler(
            spec.profile, job.profile if self.world.leads else None, self.clock, job.notify
        )
        self.optimizer = build_optimizer(self.model, spec.optimizer)
        self.telemetry = Telemetry(spec.telemetry, ElementLosses(spec.loss), self.world, bf16=self.bf16)
        self.step, self.position = 0, 0
        self.metrics: dict[str, float] = {}
        self.evaluation: Evaluation | None = None  # the last
        self.held_out_loss = math.nan  # of this very step, or it would pass for a checkpoint's
        self.checkpoint: Path | None = None

    def run(self) -> Outcome:
        """Take all the steps that are left and say how it ended."""
        events.started(self.spec, self.world, self.speed.peak)
        self.clock.start()
        self._restore()
        self.model.train()
        try:
            status, reason = self._train()
        finally:
            self.profiler.close()
        return self._outcome(status, reason)

    def _train(self) -> tuple[Status, str]:
        """Take steps to the end and return what that was, with a sentence about it."""
        while self.step < self.spec.steps:
            try:
                with self.profiler.step(self.step + 1):
                    stop = self._advance()
            except NonFiniteLossError as error:
                events.diverged(error.step, error.ranks, str(error))
                return "diverged", f"{error}; {self._last_good()}"
            if stop:
                events.stopping(self.step)
                self._save()
                return "stopped", f"stopped on request after step {self.step}"
        return "finished", ""

    def _advance(self) -> bool:
        """Take one step with what is due after it; return whether to stop early."""
        started = time.perf_counter()
        done = self._train_step(self.step + 1)
        self.step += 1
        self.position += self.spec.batch_size
        row = done.metrics | self.speed.metrics(done.units, time.perf_counter() - started)
        self.clock.settle()
        last = self.step == self.spec.steps
        save = last or self.step % self.spec.checkpoint.every == 0
        self.held_out_loss = math.nan
        if save or self.step % self.spec.evaluation.every == 0:
            evaluation = self._evaluate()
            self.held_out_loss, self.evaluation = evaluation.loss, evaluation
            row |= evaluation.metrics() | self._lap()
            events.evaluated(self.step, evaluation.metrics())
        self.metrics |= row
        self.job.watch(self.step, {"train/peak_memory_bytes": float(peak_memory_bytes(self.world.device))})
        if self.world.leads:
            self.job.record(self.step, row)
        if save:
            self._save()
        return done.stop and not last

    def _train_step(self, step: int) -> "_Step":
        """Take optimiser step ``step`` (from 1) and return its metrics.

        Raises:
            NonFiniteLossError: On every rank alike, before the parameters change.
        """
        world, spec = self.world, self.spec
        # Noise is a function of seed, step and rank, so that resuming has nothing to restore.
        torch.manual_seed(int(np.random.SeedSequence([spec.seed, step, world.rank]).generate_state(1)[0]))
        rows = self.order.rows(self.position, world.rank, world.size)
        with self.clock("data"):
            batches = list(
                micro_batches(
                    self.task.train,
                    rows,
                    size=spec.micro_batch_size,
                    largest_share=self.order.largest_share(world.size),
                )
            )
            own = [(self.task.objective.count(targets), *self.task.counts(targets)) for _, targets in batches]
        counts = self._gather([sum(column) for column in zip(*own, strict=True)])
        elements, units, further = counts.sum(dim=0).tolist()
        loss = self._accumulate(batches, elements)
        stop = float(world.leads and self.job.stop_requested())
        ranks = self._gather([loss, stop, peak_memory_bytes(world.device)])
        total = float(ranks[:, 0].sum())
        refuse_non_finite("loss", step, ranks[:, 0])
        seen, complaint = self.telemetry.look(step, total / elements, self.model, batches, rows)
        if complaint and world.leads:
            events.complained(step, complaint)
            self.job.notify(complaint)
        lr = spec.optimizer.lr * lr_factor(spec.schedule, step=step, steps=spec.steps)
        with self.clock("optimizer"):
            norm = clip_gradients(self.model, spec.optimizer.clip_norm)
            if not math.isfinite(norm):
                blame_gradient(self.model, step, world)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        metrics = {
            **self.task.train_metrics(total, elements, units, further),
            "train/grad_norm": norm,
            "train/lr": lr,
            "train/peak_memory_bytes": float(ranks[:, 2].max()),
            **seen,
        }
        return _Step(metrics, units, stop=bool(ranks[0, 1]))

    def _accumulate(self, batches: list[tuple[Tensor, Tensor]], elements: float) -> float:
        """Run all micro-batches forward and backward; return this rank's summed loss."""
        device = self.world.device
        total = torch.zeros((), device=device)
        for index, (inputs, targets) in enumerate(batches):
            with gradient_sync(self.model, enabled=index == len(batches) - 1):
                with (
                    self.clock("forward"),
                    torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16),
                ):
                    loss = self.model(inputs.to(device), targets.to(device), self.objective)
                with self.clock("backward"):
                    # Both DDP and FSDP average over ranks; the loss is to be a sum over them, divided once.
                    (loss * (self.world.size / elements)).backward()
            total += loss.detach()
        return float(total)

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
                micro_batch_size=self.spec.micro_batch_size,
                bf16=self.bf16,
            )

    def _save(self) -> None:
        if self.checkpoint is not None and self.checkpoint.name.endswith(f"{self.step:08d}"):
            return
        began = time.perf_counter()
        with self.clock("checkpoint"):
            self.checkpoint = self.job.checkpoints.save(
                self.model,
                self.optimizer,
                self.world,
                step=self.step,
                position=self.position,
                held_out_loss=self.held_out_loss,
            )
        events.saved(self.step, self.checkpoint, time.perf_counter() - began)

    def _restore(self) -> None:
        """Go on from the newest whole checkpoint, the same one on every rank."""
        with self.clock("checkpoint"):
            found = self.job.checkpoints.newest() if self.world.leads else None
            checkpoint, complaints = self.world.agree(found)
            if checkpoint is not None:
                self.job.checkpoints.load(checkpoint, self.model, self.optimizer)
        if checkpoint is not None:
            self.step, self.position = checkpoint.step, checkpoint.position
            self.checkpoint = checkpoint.folder
            events.restored(self.step, checkpoint.folder)
        if self.world.leads and (checkpoint is not None or complaints):
            origin = f"step {self.step}" if checkpoint else "the start"
            text = "; ".join([*complaints, f"going on from {origin}"])
            if complaints:
                events.complained(self.step, text)
            self.job.notify(text)

    def _last_good(self) -> str:
        if self.checkpoint is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.checkpoint}"

    def _outcome(self, status: Status, reason: str) -> Outcome:
        seconds = self._mean_seconds(self.clock.total())
        events.ended(self.step, status, reason, seconds)
        best = self.job.checkpoints.best() if self.world.leads else None
        head_memory = measure_head_memory(self.spec, self.headed_model, self.world)
        return Outcome(
            status=status,
            reason=reason,
            step=self.step,
            metrics=self.metrics,
            checkpoint=str(self.checkpoint) if self.checkpoint else None,
            best=self.world.agree(str(best.folder) if best else None),
            head_memory=self.world.agree(head_memory),
            reliability=self.evaluation.reliability if self.evaluation else {},
            collapse=self.evaluation.collapse if self.evaluation else {},
            seconds=seconds,
        )
