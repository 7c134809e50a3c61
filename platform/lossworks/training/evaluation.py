"""A model measured on data that was held out."""

import numpy as np
import torch
from torch import Tensor, nn

from lossworks.models import Objective
from lossworks.training.batches import largest_share, micro_batches, share
from lossworks.training.task import Evaluation, Rows, Task
from lossworks.training.world import World

AT_ONCE = 32  # rows, where nothing else is said


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    world: World,
    *,
    limit: int | None,
    micro_batch_size: int | None,
    bf16: bool,
) -> Evaluation:
    """Return what ``task`` measures on ``limit`` evenly spaced held-out rows, split over the ranks.

    Args:
        model: A distributed model; every rank calls this.
        task: What is held out, and what is measured.
        world: The ranks.
        limit: Rows to read; None for all.
        micro_batch_size: Rows at once; None takes a rank's share at once, at most 32.
        bf16: Run products in bfloat16.
    """
    chosen = spaced(limit, len(task.held_out))
    size = micro_batch_size or AT_ONCE

    def over(measure: Objective, data: Rows, rows: np.ndarray) -> Tensor:
        return summed(model, measure, data, rows, world, size=size, bf16=bf16)

    return task.analysed(task.evaluation(over(task.measure, task.held_out, chosen)), over)


def spaced(limit: int | None, rows: int) -> np.ndarray:
    """Return which of so many rows are read, int64: at most ``limit``, or all.

    They are evenly spaced, or a small limit would read one document only.
    """
    total = min(limit or rows, rows)
    return np.arange(total) * rows // total


@torch.no_grad()
def summed(
    model: nn.Module, measure: Objective, data: Rows, rows: np.ndarray, world: World, *, size: int, bf16: bool
) -> Tensor:
    """Return what ``measure`` gives inside the model's forward, float64 (S,), summed over rows and ranks.

    Args:
        model: A distributed model, which is not in training meanwhile; every rank calls this.
        measure: Called with features, head and targets; targets may be all ignored.
        data: Where rows are read.
        rows: Which, over all ranks.
        world: The ranks.
        size: Rows at once.
        bf16: Run products in bfloat16.
    """
    sums: Tensor | None = None
    model.eval()
    most = largest_share(len(rows), world)
    for inputs, targets in micro_batches(data, rows[share(len(rows), world)], size=size, largest_share=most):
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16):
            found = model(inputs.to(world.device), targets.to(world.device), measure)
        sums = found if sums is None else sums + found
    model.train()
    if sums is None:
        raise ValueError("there are no rows to measure")
    return world.gather(sums.tolist()).sum(dim=0)
