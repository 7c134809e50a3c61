"""From a step's rows to micro-batches that every rank has equally many of."""

import math
from collections.abc import Iterator

import numpy as np

from lossworks.data.batch import Batch, stand_in
from lossworks.tasks.interface import ExampleRows
from lossworks.training.distributed.world import World


def micro_batches(
    data: ExampleRows, rows: np.ndarray, *, size: int | None, largest_share: int
) -> Iterator[Batch]:
    """Yield this rank's rows as batches of at most ``size`` rows.

    Every rank must go through equally many forward passes, or collectives would wait for ever; a rank with a
    smaller share therefore ends with a row that counts for nothing.

    Args:
        data: Where rows are read.
        rows: This rank's share of the global batch, shape (share,).
        size: Rows a micro-batch; None takes the whole share at once.
        largest_share: The largest share any rank has of this batch.
    """
    size = size or largest_share
    for index in range(math.ceil(largest_share / size)):
        part = rows[index * size : (index + 1) * size]
        if len(part):
            yield data.batch(part)
        else:
            yield stand_in(data.batch(np.zeros(1, dtype=np.int64)))


def share(total: int, world: World) -> slice:
    """Return this rank's contiguous part of ``total`` rows; parts differ by at most one."""
    return slice(world.rank * total // world.size, (world.rank + 1) * total // world.size)


def largest_share(total: int, world: World) -> int:
    """Return the most rows of ``total`` that any rank gets."""
    return math.ceil(total / world.size)
