"""Clients' figures on their own tests over rounds, out of the table client × round."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lossworks_federated.reporting.yardstick import Yardstick
from lossworks_federated.server.client_table import read_table

_LAST = 10  # tests of a client whose mean says how it fares: one test of few examples says little


@dataclass(frozen=True, eq=False)
class ClientFigures:
    """Tests that clients made of the global model on their own examples, in the order of rounds.

    Attributes:
        rounds: After which round, int64 (n,).
        clients: Which client, int64 (n,).
        values: Its figure, float64 (n,).
        yardstick: Which figure.
    """

    rounds: np.ndarray
    clients: np.ndarray
    values: np.ndarray
    yardstick: Yardstick

    @classmethod
    def read(cls, file: Path, yardstick: Yardstick) -> "ClientFigures":
        """Return the tests in a table that :class:`ClientTable` wrote; none if there is no such file.

        Raises:
            RunError: The file is damaged.
        """
        columns = ("round", "client", yardstick.name)
        parts = [] if not file.is_file() else list(read_table(file, columns))
        tested = [np.isfinite(part[yardstick.name].astype(np.float64)) for part in parts]
        found = [
            np.concatenate([np.zeros(0), *(part[name][ok] for part, ok in zip(parts, tested, strict=True))])
            for name in columns
        ]
        rounds, clients, values = found
        return cls(rounds.astype(np.int64), clients.astype(np.int64), values.astype(np.float64), yardstick)

    def last(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the clients that have tested, sorted, and each's mean figure over its last 10 tests."""
        order = np.lexsort((self.rounds, self.clients))
        clients, first, counts = np.unique(self.clients[order], return_index=True, return_counts=True)
        place = np.arange(len(order)) - np.repeat(first, counts)
        recent = place >= np.repeat(counts - _LAST, counts)
        sums = np.bincount(np.repeat(np.arange(len(clients)), counts), self.values[order] * recent)
        return clients, sums / np.minimum(counts, _LAST)

    def worst(self, count: int) -> list[tuple[int, float]]:
        """Return the worst clients and their mean figures, the worst first."""
        clients, means = self.last()
        order = np.lexsort((clients, self.yardstick.sign * means))[:count]
        return [(int(clients[place]), float(means[place])) for place in order]
