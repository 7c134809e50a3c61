"""From the journal into the MLflow run: every row at least once, every point of a curve exactly once."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lossworks.files import write_atomically
from lossworks.specs.tracking import TrackingSpec
from lossworks.tracking.client import connect, store_errors
from lossworks.tracking.journal import JournalRow, read_rows

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

SYSTEM_JOURNAL = "system.jsonl"

_ROWS = 100
_METRICS = 1000  # MLflow's limit a request


class Delivery:
    """Sends what is new in one journal to one run.

    The byte offset up to which rows have arrived is kept in ``<journal>.delivered``, so a later process
    goes on where this one stopped. An offset is written after its rows were taken; rows whose answer was
    lost are sent again with the same time stamps, and MLflow keeps one of identical points.

    Args:
        client: Client of the store.
        run_id: Id of the run.
        journal: File of the journal; it may not exist yet.
    """

    def __init__(self, client: "MlflowClient", run_id: str, journal: Path) -> None:
        self._client = client
        self._run_id = run_id
        self._journal = journal
        self._mark = journal.with_name(f"{journal.name}.delivered")
        self._offset = _read_offset(self._mark)

    def send(self) -> int:
        """Send every complete row that is new and return how many there were.

        Raises:
            mlflow.exceptions.MlflowException: The store is away or refuses; call again later.
            OSError: The same from the network, or the offset can't be written.
        """
        sent = 0
        while True:
            rows, offset = read_rows(self._journal, self._offset, limit=_ROWS)
            if offset == self._offset:
                return sent
            self._log([metric for row in rows for metric in _metrics(row)])
            _write_offset(self._mark, offset)
            self._offset = offset
            sent += len(rows)

    def waiting(self) -> int:
        """Return how many complete rows have not been delivered."""
        return len(read_rows(self._journal, self._offset)[0])

    def _log(self, metrics: "list[Metric]") -> None:
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _METRICS])


def deliver(spec: TrackingSpec, run_id: str, journal: Path) -> int:
    """Send what is left of a run's journal, and of the system journal beside it, once.

    This is for after an outage that outlived the run.

    Returns:
        How many rows were sent.

    Raises:
        RunError: The store can't be reached or refuses; what had arrived is not sent again.
    """
    with store_errors(spec):
        return sum(delivery.send() for delivery in deliveries(connect(spec), run_id, journal))


def deliveries(client: "MlflowClient", run_id: str, journal: Path) -> list[Delivery]:
    """Return the deliveries of a run: its journal and the system journal beside it."""
    paths = (journal, journal.with_name(SYSTEM_JOURNAL))
    return [Delivery(client, run_id, path) for path in paths]


def _metrics(row: JournalRow) -> "Iterator[Metric]":
    """Yield a row's points.

    MLflow turns an infinity into 1.797e308, which flattens every chart and reads like a number. It is sent
    as NaN instead, and a point ``nonfinite/<name>`` beside it says what it was: 0 for NaN, 1 for inf and
    -1 for -inf. The journal keeps the value itself.
    """
    from mlflow.entities import Metric

    for name, value in row["metrics"].items():
        finite = math.isfinite(value)
        yield Metric(name, value if finite else math.nan, row["time_ms"], row["step"])
        if not finite:
            sign = 0.0 if math.isnan(value) else math.copysign(1.0, value)
            yield Metric(f"nonfinite/{name}", sign, row["time_ms"], row["step"])


def _read_offset(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0  # sending again is harmless


def _write_offset(path: Path, offset: int) -> None:
    write_atomically(path, str(offset))
