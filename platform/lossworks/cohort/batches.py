"""Which examples each member takes at each of its steps.

T steps, M members, B examples a step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lossworks.errors import UserError


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of members, in the order of ``members``: those with the most steps first.

    So the members that are still at work at a step are a front part of every stack.

    Attributes:
        members: Which member stands at each place, int64 (M,).
        rows: Examples, int64 (T, M, B); 0 where there is none.
        counts: How many of them count, int64 (T, M); 0 after a member's last step.
        steps: Of each place, int64 (M,), falling.
    """

    members: Tensor
    rows: Tensor
    counts: Tensor
    steps: Tensor

    def at_work(self, step: int) -> int:
        """Return how many members take this step, from 0."""
        return int((self.steps > step).sum())


def plan_batches(
    rows: Sequence[np.ndarray],
    *,
    batch_size: int,
    epochs: int,
    seeds: Sequence[Sequence[int]],
) -> Batches:
    """Return batches that visit each member's examples once an epoch, in an order of its own.

    Member i's orders are drawn from PCG64 seeded with ``seeds[i]``, so that they don't depend on who else is
    in the cohort. The last batch of an epoch holds what is left.

    Args:
        rows: Each member's examples, int64 (n_i,), at least one.
        batch_size: B.
        epochs: Passes over the examples.
        seeds: Of each member, for instance (seed, round, member).

    Raises:
        UserError: A member has no example, or a number is below 1.
    """
    for name, value in (("batch_size", batch_size), ("epochs", epochs)):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    for index, own in enumerate(rows):
        if not len(own):
            raise UserError(f"member {index}: has no examples to train on")
    # No batch holds more than all of a member's examples, and room for more would only take memory.
    batch_size = min(batch_size, max(map(len, rows), default=batch_size))
    steps = np.array([math.ceil(len(own) / batch_size) * epochs for own in rows], dtype=np.int64)
    order = np.argsort(-steps, kind="stable")
    total = int(steps.max(initial=0))
    batches = np.zeros((total, len(rows), batch_size), dtype=np.int64)
    counts = np.zeros((total, len(rows)), dtype=np.int64)
    for place, index in enumerate(order):
        visited, sizes = _of_member(np.asarray(rows[index]), batch_size, epochs, seeds[index])
        batches[: len(sizes), place] = visited
        counts[: len(sizes), place] = sizes
    return Batches(*(torch.from_numpy(array) for array in (order, batches, counts, steps[order])))


def _of_member(
    rows: np.ndarray, batch_size: int, epochs: int, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a member's batches (K_i, B), filled up with 0, and how many of each count (K_i,)."""
    generator = np.random.Generator(np.random.PCG64(list(seed)))
    each = math.ceil(len(rows) / batch_size)
    visited = np.zeros((epochs, each * batch_size), dtype=np.int64)
    for epoch in range(epochs):
        visited[epoch, : len(rows)] = generator.permutation(rows)
    sizes = np.full(each, batch_size)
    sizes[-1] = len(rows) - (each - 1) * batch_size
    return visited.reshape(epochs * each, batch_size), np.tile(sizes, epochs)
