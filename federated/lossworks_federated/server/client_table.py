"""The table client × round: what each client did in each round, kept as it comes and made Parquet at the end.

Rows have a fixed size and are appended to ``clients.rows``, in the order of rounds. So nothing is held in
memory, a stopped run is cut back to the round that it goes on from, and no row is there twice.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from lossworks.cohort import Member
from lossworks.errors import RunError
from lossworks.files import hidden_beside
from lossworks_federated.server.screening import Received
from lossworks_federated.strategies.interface import OwnTest

_ROW = np.dtype(
    [
        ("round", "<i4"),
        ("client", "<i4"),
        ("asked", "?"),
        ("used", "?"),
        ("left_out", "S16"),
        ("examples", "<i8"),
        ("loss", "<f4"),
        ("drift", "<f4"),
        ("cosine", "<f4"),
        ("bytes_down", "<i8"),
        ("bytes_up", "<i8"),
        ("virtual_seconds", "<f8"),
        ("test_examples", "<i8"),
        ("test_loss", "<f4"),
        ("figure", "<f4"),
    ]
)
_ROWS_AT_ONCE = 2**16  # of a row group


@dataclass(frozen=True)
class Exchange:
    """What went to a client and what came from it.

    Attributes:
        client: Its number.
        down: Bytes of arrays to it.
        up: Bytes of arrays from it, 0 if no reply came.
        seconds: Virtual seconds from the instruction to the reply; NaN where devices have no speeds.
        left_out: Why the reply is not used, a reason of ``screening``; empty where it is.
    """

    client: int
    down: int
    up: int
    seconds: float = float("nan")
    left_out: str = ""


class ClientTable:
    """Rows of one strategy with one seed; a context manager, which writes the Parquet file when it is left.

    Columns: ``round``, ``client``, ``asked`` (whether it was told to train), ``used`` (whether its reply
    counts), ``left_out`` (why not, one of :data:`lossworks_federated.server.screening.REASONS`), ``examples``
    and ``loss`` (of its training), ``drift`` (the norm ‖g_i‖ of its update), ``cosine`` (of g_i with w⁺ − w⁰,
    what the round moved the global model by), ``bytes_down``, ``bytes_up``, ``virtual_seconds``, and where
    it tested the new global model on its own examples ``test_examples``, ``test_loss`` and the figure in
    which clients are compared, by its name. What is unknown is null.

    Args:
        file: The Parquet file; the rows are beside it.
        done: The round that is gone on from; later rows are dropped.
        name: Of the figure in which clients are compared.

    Raises:
        RunError: The rows can't be opened.
    """

    def __init__(self, file: Path, done: int, name: str = "accuracy") -> None:
        self._name = name
        self.file, self._log = file, file.with_suffix(".rows")
        try:
            self._log.touch()
            whole = self._log.stat().st_size // _ROW.itemsize * _ROW.itemsize
            os.truncate(self._log, whole)  # a kill leaves half a row
            kept = int(np.searchsorted(_rows(self._log)["round"], done, "right"))
            os.truncate(self._log, kept * _ROW.itemsize)
            self._stream = self._log.open("ab", buffering=0)
        except OSError as error:
            raise RunError(f"{self._log}: the table of clients can't be opened: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        _write_parquet(_rows(self._log), self.file, self._name)

    def write(self, rows: np.ndarray) -> None:
        """Append the rows of a round, as ``rows_of`` makes them.

        Raises:
            RunError: They can't be written, for instance because the disk is full.
        """
        try:
            self._stream.write(rows.tobytes())
        except OSError as error:
            raise RunError(f"{self._log}: the table of clients can't be written: {error.strerror}") from None


def rows_of(
    server_round: int,
    exchanges: Sequence[Exchange],
    received: Received,
    model: tuple[Member, Member],
    tested: Mapping[int, OwnTest],
    name: str = "accuracy",
) -> np.ndarray:
    """Return the rows of a round.

    Args:
        server_round: The round.
        exchanges: With the clients that were asked; those whose reply counts in the order of ``received``.
        received: The usable replies.
        model: The global model before the round and after it.
        tested: Tests of the clients' own examples after it, by client.
        name: Of the figure in which clients are compared.
    """
    only_tested = sorted(set(tested) - {one.client for one in exchanges})
    rows = np.zeros(len(exchanges) + len(only_tested), _ROW)
    for column in ("loss", "drift", "cosine", "virtual_seconds", "test_loss", "figure"):
        rows[column] = np.nan
    asked = rows[: len(exchanges)]
    rows["round"] = server_round
    rows["client"] = [*(one.client for one in exchanges), *only_tested]
    asked["asked"] = True
    asked["bytes_down"] = [one.down for one in exchanges]
    asked["bytes_up"] = [one.up for one in exchanges]
    asked["virtual_seconds"] = [one.seconds for one in exchanges]
    asked["left_out"] = [one.left_out.encode() for one in exchanges]
    asked["used"] = asked["left_out"] == b""
    used = np.flatnonzero(asked["used"])
    asked["examples"][used] = received.examples.numpy()
    if received.reports("loss"):
        asked["loss"][used] = received.column("loss").numpy()
    asked["drift"][used], asked["cosine"][used] = _geometry(received, *model)
    places = {int(client): place for place, client in enumerate(rows["client"])}
    for client, one in tested.items():
        row = places[client]
        rows["test_examples"][row] = one.examples
        rows["test_loss"][row] = one.figures.get("loss", np.nan)
        rows["figure"][row] = one.figures.get(name, np.nan)
    return rows


def _geometry(received: Received, origin: Member, new: Member) -> tuple[np.ndarray, np.ndarray]:
    """Return ‖g_i‖ and the cosine of g_i with w⁺ − w⁰, float64 (m,); a cosine with nothing is NaN."""
    m = len(received.partitions)
    squares, inner = torch.zeros(m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    applied_square = 0.0
    for name, update in received.updates.items():
        flat = update.reshape(m, -1).float()
        applied = (new[name] - origin[name]).flatten().float()
        squares += torch.linalg.vector_norm(flat, dim=1).double().square()
        inner += (flat @ applied).double()
        applied_square += float(torch.linalg.vector_norm(applied).double().square())
    norms = squares.sqrt()
    return norms.numpy(), (inner / (norms * applied_square**0.5)).numpy()


def read_table(file: Path, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield columns of a table in chunks of at most 65,536 rows; nulls are NaN.

    Raises:
        RunError: The file is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as found:
            for batch in found.iter_batches(_ROWS_AT_ONCE, columns=list(columns)):
                yield {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{file}: is damaged: {error}") from None


def _rows(log: Path) -> np.ndarray:
    if not log.stat().st_size:  # nothing can be mapped of an empty file
        return np.zeros(0, _ROW)
    return np.memmap(log, _ROW, mode="r")


def _write_parquet(rows: np.ndarray, file: Path, name: str) -> None:
    """Write all rows, in row groups, in one piece."""
    from pyarrow import parquet

    partial = hidden_beside(file)
    try:
        with parquet.ParquetWriter(partial, _columns(rows[:0], name).schema, compression="zstd") as writer:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                writer.write_table(_columns(rows[start : start + _ROWS_AT_ONCE], name))
        partial.replace(file)
    except OSError as error:
        raise RunError(f"{file}: can't be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def _columns(rows: np.ndarray, figure: str) -> Any:
    """Return rows as a table of Arrow, with null for what is unknown."""
    import pyarrow as pa

    asked, tested = rows["asked"], rows["test_examples"] > 0
    unknown = {
        "left_out": rows["left_out"] == b"",
        "examples": ~rows["used"],
        "bytes_down": ~asked,
        "bytes_up": ~asked,
        "test_examples": ~tested,
    }
    columns = {}
    for name in _ROW.names or ():
        values = np.ascontiguousarray(rows[name])
        if name == "left_out":
            values = values.astype(str).astype(object)
        missing = np.isnan(values) if values.dtype.kind == "f" else unknown.get(name)
        kind = pa.string() if name == "left_out" else None
        columns[figure if name == "figure" else name] = pa.array(values, mask=missing, type=kind)
    return pa.table(columns)
