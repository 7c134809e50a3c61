"""The order in which training visits sequences: endless, seeded, and independent of the workers."""

import math
from typing import Protocol

import numpy as np


class Order(Protocol):
    """Which rows each worker takes at each place of a run."""

    def rows(self, position: int, rank: int, workers: int) -> np.ndarray:
        """Return one worker's rows of the global batch at ``position``, int64, shape (rows,)."""

    def largest_share(self, workers: int) -> int:
        """Return the most rows of a batch that any of ``workers`` gets."""


class SequenceOrder:
    """A deterministic order of sequences that any number of workers can take up anywhere.

    Epoch e visits the sequences in a permutation drawn from PCG64 with the seed (seed, e). The epochs
    follow one another without a gap, and a global batch is the next ``batch_size`` entries, so a batch may
    hold the end of one epoch and the start of the next. A run's place in the order is one integer, the
    number of sequences consumed so far.

    Example:
        >>> order = SequenceOrder(sequences=5, batch_size=4, seed=0)
        >>> whole = order.rows(position=4, rank=0, workers=1)
        >>> shares = [order.rows(position=4, rank=rank, workers=3) for rank in range(3)]
        >>> [len(share) for share in shares], (np.concatenate(shares) == whole).all().item()
        ([1, 1, 2], True)

    Args:
        sequences: Number of sequences, at least 1.
        batch_size: Sequences a global batch, over all workers, at least 1.
        seed: Seed of all permutations, at least 0.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, sequences: int, batch_size: int, seed: int) -> None:
        for name, value, least in (
            ("sequences", sequences, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        self.sequences = sequences
        self.batch_size = batch_size
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def rows(self, position: int, rank: int, workers: int) -> np.ndarray:
        """Return one worker's share of the global batch that starts at ``position``.

        Args:
            position: Sequences consumed so far, by all workers together.
            rank: The worker, 0 to ``workers - 1``.
            workers: Number of workers. Shares differ by at most one sequence; where ``workers`` is larger
                than the batch some are empty.

        Returns:
            Indices of sequences, int64, shape (rows,). The shares of ranks 0, 1, … joined are the batch.

        Raises:
            ValueError: A number is out of range.
        """
        if position < 0 or not 0 <= rank < workers:
            raise ValueError(
                f"position={position}, rank={rank}, workers={workers}: "
                "must be position >= 0 and 0 <= rank < workers"
            )
        start, stop = self.places(position, rank, workers)
        epochs = range(start // self.sequences, -(-stop // self.sequences))
        # Only what this share needs stays; the next one mostly needs the same epoch again.
        self._permutations = {epoch: self._permutation(epoch) for epoch in epochs} or self._permutations
        parts = [self._part(epoch, start, stop) for epoch in epochs]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def places(self, position: int, rank: int, workers: int) -> tuple[int, int]:
        """Return where in the endless order a worker's share begins, and where it ends; see :meth:`rows`."""
        start = position + rank * self.batch_size // workers
        return start, position + (rank + 1) * self.batch_size // workers

    def largest_share(self, workers: int) -> int:
        """Return the most sequences of a batch that any of ``workers`` gets."""
        return -(-self.batch_size // workers)

    def _part(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the entries of places ``start`` to ``stop - 1`` that lie in one epoch."""
        first = epoch * self.sequences
        return self._permutations[epoch][max(start - first, 0) : stop - first]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch in self._permutations:
            return self._permutations[epoch]
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.sequences)


class BagOrder:
    """The same order over bags: every batch, and every worker's share of it, is made of whole bags.

    Rows b·k to b·k + k − 1 are bag b. Positions count rows, as those of ``SequenceOrder`` do.

    Args:
        rows: Number of rows; those beyond the last whole bag are never visited.
        bag_size: Rows a bag, k.
        batch_size: Rows a global batch, a multiple of k.
        seed: Seed of all permutations, at least 0.

    Raises:
        ValueError: A number is out of range, or the batch doesn't consist of whole bags.
    """

    def __init__(self, rows: int, bag_size: int, batch_size: int, seed: int) -> None:
        if bag_size < 1 or batch_size % bag_size:
            raise ValueError(f"batch_size={batch_size}: must be a multiple of bag_size={bag_size}")
        self._bag_size = bag_size
        self._bags = SequenceOrder(rows // bag_size, batch_size // bag_size, seed)

    def rows(self, position: int, rank: int, workers: int) -> np.ndarray:
        """Return the rows of one worker's bags, those of a bag together, int64, shape (rows,).

        Shares differ by at most a bag.
        """
        bags = self._bags.rows(position // self._bag_size, rank, workers)
        return (bags[:, None] * self._bag_size + np.arange(self._bag_size)).reshape(-1)

    def largest_share(self, workers: int) -> int:
        """Return the most rows of a batch that any of ``workers`` gets."""
        return self._bags.largest_share(workers) * self._bag_size


class VisitOrder:
    """The same order with the epoch in each number: visit = epoch · N + row, for data that differ by visit.

    What is drawn for a visit, such as a patch of an image, is so a function of one number that no other visit
    of a run has. Positions count rows, as those of ``SequenceOrder`` do.

    Args:
        rows: Number of rows, N, at least 1.
        batch_size: Rows a global batch, at least 1.
        seed: Seed of all permutations, at least 0.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self._rows = SequenceOrder(rows, batch_size, seed)

    def rows(self, position: int, rank: int, workers: int) -> np.ndarray:
        """Return one worker's visits, int64, shape (rows,); a visit's row is its remainder by N."""
        count = self._rows.sequences
        rows = self._rows.rows(position, rank, workers)
        return rows + np.arange(*self._rows.places(position, rank, workers)) // count * count

    def largest_share(self, workers: int) -> int:
        """Return the most rows of a batch that any of ``workers`` gets."""
        return self._rows.largest_share(workers)


def held_out_of(rows: int, fraction: float) -> int:
    """Return how many of so many rows are held out for evaluation: a share of them, and one at least."""
    return max(1, math.ceil(fraction * rows))


def spaced(limit: int | None, rows: int) -> np.ndarray:
    """Return which of so many rows are read, int64: at most ``limit``, or all.

    They are evenly spaced, or a small limit would read one document only.
    """
    total = min(limit or rows, rows)
    return np.arange(total) * rows // total
