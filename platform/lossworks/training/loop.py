"""The training loop: plain torch, the same under any launcher."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lossworks.data import TokenizedCorpus
from lossworks.errors import NonFiniteLossError
from lossworks.specs import AnyTrainSpec
from lossworks.training.batches import micro_batches
from lossworks.training.checkpoint import CheckpointStore
from lossworks.training.evaluation import evaluate
from lossworks.training.hardware import peak_flops, peak_memory_bytes
from lossworks.training.head_memory import measure_head_memory
from lossworks.training.objective import ElementLosses
from lossworks.training.optimizer import build_optimizer, non_finite_gradients, set_lr
from lossworks.training.outcome import Outcome, Status
from lossworks.training.schedule import lr_factor
from lossworks.training.sharding import clip_gradients, distribute, gradient_sync
from lossworks.training.task import Evaluation, build_task
from lossworks.training.telemetry import Telemetry
from lossworks.training.world import World

Record = Callable[[int, dict[str, float]], object]
Notify = Callable[[str], object]


def _say_nothing(_: str) -> None:
    """Take a notice nobody wants."""


@dataclass(frozen=True)
class Job:
    """What a process needs to take part in a run.

    Attributes:
        spec: The run.
        corpus: The tokenised text of a language model; None for classifiers.
        checkpoints: Where the run's checkpoints are, on storage that all ranks share.
        record: Called by rank 0 with a step and its metrics; must not block.
        notify: Called by rank 0 with a sentence that a person should see.
        stop_requested: Asked by rank 0 after every step; when true the run saves a checkpoint and ends.
    """

    spec: AnyTrainSpec
    corpus: TokenizedCorpus | None
    checkpoints: CheckpointStore
    record: Record
    notify: Notify = _say_nothing
    stop_requested: Callable[[], bool] = lambda: False


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
        self.flops_per_unit = self.task.flops_per_unit(model)
        self.bf16 = spec.precision == "bf16"
        self.model = distribute(model, spec, self.world)
        self.optimizer = build_optimizer(self.model, spec.optimizer)
        self.telemetry = Telemetry(spec.telemetry, ElementLosses(spec.loss), self.world, bf16=self.bf16)
        self.step, self.position = 0, 0
        self.metrics: dict[str, float] = {}
        self.evaluation: Evaluation | None = None  # the last
        self.held_out_loss = math.nan  # of this very step, or it would pass for a checkpoint's
        self.checkpoint: Path | None = None

    def run(self) -> Outcome:
        """Take all the steps that are left and say how it ended."""
        self._restore()
        self.model.train()
        while self.step < self.spec.steps:
            try:
                stop = self._advance()
            except NonFiniteLossError as error:
                return self._outcome("diverged", f"{error}; {self._last_good()}")
            if stop:
                self._save()
                return self._outcome("stopped", f"stopped on request after step {self.step}")
        return self._outcome("finished", "")

    def _advance(self) -> bool:
        """Take one step with what is due after it; return whether to stop early."""
        started = time.perf_counter()
        done = self._train_step(self.step + 1)
        self.step += 1
        self.position += self.spec.batch_size
        row = done.metrics | self._throughput(done.units, time.perf_counter() - started)
        last = self.step == self.spec.steps
        save = last or self.step % self.spec.checkpoint.every == 0
        self.held_out_loss = math.nan
        if save or self.step % self.spec.evaluation.every == 0:
            evaluation = self._evaluate()
            self.held_out_loss, self.evaluation = evaluation.loss, evaluation
            row |= evaluation.metrics()
        self.metrics |= row
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
        batches = list(
            micro_batches(
                self.task.train,
                rows,
                size=spec.micro_batch_size,
                largest_share=self.order.largest_share(world.size),
            )
        )
        own = [(self.task.objective.count(targets), *self.task.counts(targets)) for _, targets in batches]
        counts = world.gather([sum(column) for column in zip(*own, strict=True)])
        elements, units, further = counts.sum(dim=0).tolist()
        loss = self._accumulate(batches, elements)
        stop = float(world.leads and self.job.stop_requested())
        shares = world.gather([loss, stop, peak_memory_bytes(world.device)])
        total = float(shares[:, 0].sum())
        self._refuse_non_finite("loss", step, shares[:, 0])
        seen, complaint = self.telemetry.look(step, total / elements, self.model, batches, rows)
        if complaint and world.leads:
            self.job.notify(complaint)
        norm = clip_gradients(self.model, spec.optimizer.clip_norm)
        if not math.isfinite(norm):
            self._blame_gradient(step)
        lr = spec.optimizer.lr * lr_factor(spec.schedule, step=step, steps=spec.steps)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {
            **self.task.train_metrics(total, elements, units, further),
            "train/grad_norm": norm,
            "train/lr": lr,
            "train/peak_memory_bytes": float(shares[:, 2].max()),
            **seen,
        }
        return _Step(metrics, units, stop=bool(shares[0, 1]))

    def _accumulate(self, batches: list[tuple[Tensor, Tensor]], elements: float) -> float:
        """Run all micro-batches forward and backward; return this rank's summed loss."""
        device = self.world.device
        total = torch.zeros((), device=device)
        for index, (inputs, targets) in enumerate(batches):
            with gradient_sync(self.model, enabled=index == len(batches) - 1):
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
                    loss = self.model(inputs.to(device), targets.to(device), self.task.objective)
                # Both DDP and FSDP average over ranks; the loss is to be a sum over them, divided once.
                (loss * (self.world.size / elements)).backward()
            total += loss.detach()
        return float(total)

    def _refuse_non_finite(self, what: str, step: int, values: Tensor) -> None:
        ranks = tuple(values.isfinite().logical_not().nonzero().squeeze(1).tolist())
        if ranks:
            named = ", ".join(map(str, ranks))
            raise NonFiniteLossError(
                f"the {what} became NaN or infinite at step {step} on rank {named}", step=step, ranks=ranks
            )

    def _blame_gradient(self, step: int) -> None:
        """Raise for a gradient norm that is not finite, naming the ranks and a parameter."""
        bad = non_finite_gradients(self.model)
        flags = self.world.gather([math.nan if bad else 0.0])[:, 0]
        where = self.world.agree(bad[0] if bad else "the norm of finite gradients overflowed")
        self._refuse_non_finite(
            f"gradient ({where})", step, flags if flags.isnan().any() else flags * math.nan
        )

    def _throughput(self, units: float, seconds: float) -> dict[str, float]:
        rate = units / seconds
        row = {"train/step_seconds": seconds, f"train/{self.task.unit}_per_second": rate}
        peak = peak_flops(self.world.device, bf16=self.bf16)
        if peak is not None and self.flops_per_unit is not None:
            row["train/mfu"] = self.flops_per_unit * rate / (peak * self.world.size)
        return row

    def _evaluate(self) -> Evaluation:
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
        self.checkpoint = self.job.checkpoints.save(
            self.model,
            self.optimizer,
            self.world,
            step=self.step,
            position=self.position,
            held_out_loss=self.held_out_loss,
        )

    def _restore(self) -> None:
        """Go on from the newest whole checkpoint, the same one on every rank."""
        found = self.job.checkpoints.newest() if self.world.leads else None
        checkpoint, complaints = self.world.agree(found)
        if checkpoint is not None:
            self.job.checkpoints.load(checkpoint, self.model, self.optimizer)
            self.step, self.position = checkpoint.step, checkpoint.position
            self.checkpoint = checkpoint.folder
        if self.world.leads and (checkpoint is not None or complaints):
            origin = f"step {self.step}" if checkpoint else "the start"
            self.job.notify("; ".join([*complaints, f"going on from {origin}"]))

    def _last_good(self) -> str:
        if self.checkpoint is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.checkpoint}"

    def _outcome(self, status: Status, reason: str) -> Outcome:
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
        )
