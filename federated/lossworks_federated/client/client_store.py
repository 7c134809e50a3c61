"""What many clients keep, in one SQLite file, so that a million of them need no million folders."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from lossworks.cohort import Member
from lossworks.errors import RunError
from lossworks_federated.records import flattened, grouped

_LIMIT_S = 120.0  # that a process waits while others write
_TABLE = """CREATE TABLE IF NOT EXISTS kept (
    client INTEGER, round INTEGER, tensors BLOB, PRIMARY KEY (client, round)
)"""
_NEWEST = "SELECT tensors FROM kept WHERE client = ? AND round < ? ORDER BY round DESC LIMIT 1"
# What an attempt that was stopped has kept later, and what is older than the newest that is safe.
_OLD = (
    "DELETE FROM kept WHERE client = :client AND (round > :round OR round < "
    "(SELECT MAX(round) FROM kept WHERE client = :client AND round <= :safe))"
)


class ClientStore:
    """What clients keep after their rounds, as safetensors by client and round.

    Each call opens the file anew, so that processes and threads can share it.

    Args:
        path: The file; it and its folder are made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Return whether anything was written and is still there."""
        return self.path.is_file()

    def read(self, clients: Sequence[int], before: int) -> list[dict[str, Member]]:
        """Return what each client kept last before a round, by group; nothing where it kept nothing.

        Raises:
            RunError: The file is damaged.
        """
        from safetensors.torch import load

        if not self.exists():
            return [{} for _ in clients]
        with self._opened() as database:
            rows = [database.execute(_NEWEST, (client, before)).fetchone() for client in clients]
            return [{} if row is None else grouped(load(row[0])) for row in rows]

    def write(
        self, kept: Iterable[tuple[int, Mapping[str, Member]]], server_round: int, *, safe: int
    ) -> None:
        """Write what clients keep after a round, all or nothing, and drop what nobody will ask for.

        Args:
            kept: By client, tensors by group.
            server_round: The round.
            safe: The last round that the server may go on from; the newest version up to it stays.

        Raises:
            RunError: It can't be written.
        """
        from safetensors.torch import save

        rows = [
            {
                "client": client,
                "round": server_round,
                "safe": safe,
                "tensors": save({name: value.contiguous() for name, value in flattened(groups).items()}),
            }
            for client, groups in kept
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened() as database:
            database.execute(_TABLE)
            database.executemany("INSERT OR REPLACE INTO kept VALUES (:client, :round, :tensors)", rows)
            database.executemany(_OLD, rows)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        from safetensors import SafetensorError

        try:
            with closing(sqlite3.connect(self.path, timeout=_LIMIT_S)) as database, database:
                yield database
        except (sqlite3.Error, SafetensorError, OverflowError) as error:
            raise RunError(f"{self.path}: what clients keep can't be read or written: {error}") from None
