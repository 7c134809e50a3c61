"""A model measured on data that was held out."""

import numpy as np
import torch
from torch import nn

from lossworks.training.batches import largest_share, micro_batches, share
from lossworks.training.task import Evaluation, Task
from lossworks.training.world import World

_AT_ONCE = 32  # rows, where nothing else is said


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
    total = min(limit or len(task.held_out), len(task.held_out))
    # Evenly spaced, or a small limit would read one document only.
    rows = (np.arange(total) * len(task.held_out) // total)[share(total, world)]
    sums: torch.Tensor | None = None
    model.eval()
    for inputs, targets in micro_batches(
        task.held_out,
        rows,
        size=micro_batch_size or _AT_ONCE,
        largest_share=largest_share(total, world),
    ):
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16):
            found = model(inputs.to(world.device), targets.to(world.device), task.measure)
        sums = found if sums is None else sums + found
    model.train()
    if sums is None:
        raise ValueError("there is nothing held out")
    return task.evaluation(world.gather(sums.tolist()).sum(dim=0))
