"""A model measured on data that was held out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from lossworks.data.batch import Batch, on
from lossworks.data.order import spaced
from lossworks.models import Outputs
from lossworks.tasks.analyses import Analysis, Finding, Probe
from lossworks.tasks.interface import Evaluation, ExampleRows, Measure, Sums, Task
from lossworks.training.batches import largest_share, micro_batches, share
from lossworks.training.distributed.world import World

AT_ONCE = 32  # rows, where nothing else is said

Completed = Callable[[Batch], tuple[Batch, dict[str, Outputs]]]
"""From a batch to one with what its task reads of companions, and the outputs of those that losses read."""


def _alone(batch: Batch) -> tuple[Batch, dict[str, Outputs]]:
    """Return a batch as it is, where the model has no companions."""
    return batch, {}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    world: World,
    *,
    limit: int | None,
    micro_batch_size: int | None,
    bf16: bool,
    analyses: Sequence[Analysis] = (),
    completed: Completed = _alone,
) -> Evaluation:
    """Return what ``task`` measures on ``limit`` evenly spaced held-out rows, split over the ranks.

    Args:
        model: A distributed model; every rank calls this.
        task: What is held out, and what is measured.
        world: The ranks.
        limit: Rows to read; None for all.
        micro_batch_size: Rows at once; None takes a rank's share at once, at most 32.
        bf16: Run products in bfloat16.
        analyses: What is measured besides, each with passes of its own.
        completed: Gives what is read of companions of the model.
    """
    over = _summing(model, world, micro_batch_size, bf16=bf16, completed=completed)
    chosen = spaced(limit, len(task.held_out))
    found = task.evaluation(over(task.measured, task.held_out, chosen))
    for analysis in analyses:
        more = analysis.measure(Probe(task, over, chosen, model))
        figures = {f"eval/{name}": value for name, value in more.figures.items()}
        pictured = {analysis.slug: more.pictured} if more.pictured else {}
        found = replace(found, yardsticks=found.yardsticks | figures, pictured=found.pictured | pictured)
    return found


def analysed(
    model: nn.Module,
    task: Task,
    world: World,
    analysis: Analysis,
    *,
    limit: int | None,
    micro_batch_size: int | None,
    bf16: bool,
    completed: Completed = _alone,
) -> Finding:
    """Return what an analysis of models finds; arguments as for :func:`evaluate`."""
    over = _summing(model, world, micro_batch_size, bf16=bf16, completed=completed)
    return analysis.measure(Probe(task, over, spaced(limit, len(task.held_out)), model))


def _summing(
    model: nn.Module,
    world: World,
    micro_batch_size: int | None,
    *,
    bf16: bool,
    completed: Completed = _alone,
) -> Sums:
    size = micro_batch_size or AT_ONCE

    def over(measure: Measure, data: ExampleRows, rows: np.ndarray) -> Tensor:
        return summed(model, measure, data, rows, world, size=size, bf16=bf16, completed=completed)

    return over


@torch.no_grad()
def summed(
    model: nn.Module,
    measure: Measure,
    data: ExampleRows,
    rows: np.ndarray,
    world: World,
    *,
    size: int,
    bf16: bool,
    completed: Completed = _alone,
) -> Tensor:
    """Return what ``measure`` gives inside the model's forward, float64 (S,), summed over rows and ranks.

    Args:
        model: A distributed model, which is not in training meanwhile; every rank calls this.
        measure: Called with the model's outputs and a batch, whose rows may all count for nothing.
        data: Where rows are read.
        rows: Which, over all ranks.
        world: The ranks.
        size: Rows at once.
        bf16: Run products in bfloat16.
        completed: As for :func:`evaluate`.
    """
    sums: Tensor | None = None
    model.eval()
    most = largest_share(len(rows), world)
    for batch in micro_batches(data, rows[share(len(rows), world)], size=size, largest_share=most):
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16):
            batch, companions = completed(batch)  # noqa: PLW2901 - the same rows, with more
            found = model(on(world.device, batch), beside(measure, companions) if companions else measure)
        sums = found if sums is None else sums + found
    model.train()
    if sums is None:
        raise ValueError("there are no rows to measure")
    return world.gather(sums.tolist()).sum(dim=0)


def beside(measure: Measure, companions: Mapping[str, Outputs]) -> Measure:
    """Return a measure that sees the outputs of companions, too."""
    return lambda outputs, batch: measure(outputs.with_roles(companions), batch)


@torch.no_grad()
def collected(
    model: nn.Module,
    measure: Measure,
    data: ExampleRows,
    rows: np.ndarray,
    world: World,
    *,
    size: int,
    bf16: bool,
) -> Tensor:
    """Return what ``measure`` gives of each row inside the model's forward, float64 (N, …), on every rank.

    Args:
        model: A distributed model, which is not in training meanwhile; every rank calls this.
        measure: Called with outputs and a batch (B, …); gives (B, …).
        data: Where rows are read.
        rows: Which, N over all ranks.
        world: The ranks.
        size: Rows at once.
        bf16: Run products in bfloat16.
    """
    model.eval()
    own = rows[share(len(rows), world)]
    most = largest_share(len(rows), world)
    parts = []
    for batch in micro_batches(data, own, size=size, largest_share=most):
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16):
            parts.append(model(on(world.device, batch), measure).double().cpu())
    model.train()
    found = torch.cat(parts)[: len(own)]
    padded = found.new_zeros(most, *found.shape[1:])
    padded[: len(found)] = found
    ranks = world.gather(padded.flatten().tolist()).reshape(world.size, most, *found.shape[1:])
    sizes = [len(rows[share(len(rows), World(rank, world.size, world.device))]) for rank in range(world.size)]
    return torch.cat([part[:count] for part, count in zip(ranks, sizes, strict=True)])
