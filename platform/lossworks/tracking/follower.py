"""The driver's side of a run: follow the journal, show its rows and bring them to MLflow."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lossworks.errors import redact
from lossworks.specs.tracking import TrackingSpec
from lossworks.tracking.address import tracking_uri
from lossworks.tracking.client import connect, one_line
from lossworks.tracking.delivery import SYSTEM_JOURNAL, Delivery, deliveries
from lossworks.tracking.journal import JournalRow, read_rows

if TYPE_CHECKING:
    from lossworks.tracking.system_metrics import JournalMonitor

_logger = logging.getLogger(__name__)

_LOOK_S = 0.2
_SEND_S = 2.0
_LONGEST_PAUSE_S = 30.0
_DRAIN_PAUSE_S = 1.0


class Follower:
    """Follows a journal while the run goes on; a context manager in the driver.

    One thread shows new rows at once, another sends them every two seconds, so a hanging server does not
    stop the display. A server that is away is reported once when it is lost and once when it is back;
    nothing is raised into the driver. Leaving the ``with`` block drains with the spec's patience, or
    without waiting when an exception is on its way.

    Args:
        spec: Where the run is.
        run_id: Its id.
        journal: File of the journal; it may not exist yet.
        on_row: Called in a thread for each row that is appended from now on.
        system_metrics: Whether to sample this machine into ``system.jsonl`` beside the journal.
        on_message: Called with each message for the user; they are logged as warnings if unset.

    Attributes:
        undelivered: Rows that were left when the follower closed.
    """

    def __init__(
        self,
        spec: TrackingSpec,
        run_id: str,
        journal: Path,
        *,
        on_row: Callable[[JournalRow], None] | None = None,
        system_metrics: bool = False,
        on_message: Callable[[str], None] | None = None,
    ) -> None:
        self.undelivered = 0
        self._spec = spec
        self._run_id = run_id
        self._journal = Path(journal)
        self._on_row = on_row
        self._on_message = on_message or _logger.warning
        self._system_metrics = system_metrics
        self._monitor: JournalMonitor | None = None
        self._deliveries: list[Delivery] = []
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._deadline = 0.0
        self._away = False
        self._shown = 0

    def __enter__(self) -> Self:
        """Start to follow.

        Raises:
            RunError: The store can't be opened, or the system journal can't be written.
        """
        self._deliveries = deliveries(connect(self._spec), self._run_id, self._journal)
        self._shown = read_rows(self._journal)[1]
        if self._system_metrics:
            self._monitor = self._start_monitor()
        for loop in (self._show_rows, self._send_rows):
            thread = threading.Thread(target=loop, name=f"lossworks{loop.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(self._spec.patience_s if kind is None else 0.0)

    def close(self, patience_s: float) -> int:
        """Deliver all that is left and stop; a second call does nothing.

        One attempt is always made. A server that takes the connection but never answers can hold it for
        two timeouts of ten seconds.

        Args:
            patience_s: Seconds to wait for a server that is away.

        Returns:
            Rows that were not delivered; they stay in the journal, for ``deliver``.
        """
        if self._closing.is_set() or not self._threads:
            return self.undelivered
        if self._monitor is not None:
            self._monitor.finish()
        self._deadline = time.monotonic() + patience_s
        self._closing.set()
        for thread in self._threads:
            thread.join()
        self.undelivered = sum(delivery.waiting() for delivery in self._deliveries)
        return self.undelivered

    def _start_monitor(self) -> "JournalMonitor":
        from lossworks.tracking.system_metrics import JournalMonitor

        path = self._journal.with_name(SYSTEM_JOURNAL)
        monitor = JournalMonitor(self._run_id, tracking_uri(self._spec), path)
        monitor.start()
        return monitor

    def _show_rows(self) -> None:
        if self._on_row is None:
            return
        while not self._closing.wait(_LOOK_S):
            self._show(self._on_row)
        self._show(self._on_row)

    def _show(self, on_row: Callable[[JournalRow], None]) -> None:
        try:
            rows, self._shown = read_rows(self._journal, self._shown)
            for row in rows:
                on_row(row)
        except Exception:
            # A display that fails is no reason to lose the run.
            _logger.exception("a row could not be shown")

    def _send_rows(self) -> None:
        pause = _SEND_S
        while not self._closing.wait(pause):
            # The pause doubles while the server is away, so that it is not hammered when it comes back.
            pause = _SEND_S if self._send() else min(2 * pause, _LONGEST_PAUSE_S)
        while not self._send():
            left = self._deadline - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(_DRAIN_PAUSE_S, left))

    def _send(self) -> bool:
        """Send what is new and return whether the server took it all."""
        try:
            for delivery in self._deliveries:
                delivery.send()
        except Exception as error:  # noqa: BLE001  (whatever it is, the rows are safe and the run goes on)
            self._report(error)
            return False
        self._report(None)
        return True

    def _report(self, error: Exception | None) -> None:
        """Tell the user once when the server is lost and once when it is back."""
        away = error is not None
        if away == self._away:
            return
        self._away = away
        store = redact(tracking_uri(self._spec))
        if error is None:
            self._on_message(f"tracking store {store}: is back, every row has arrived")
        else:
            self._on_message(
                f"tracking store {store}: is away, the run goes on and its rows wait in {self._journal} "
                f"({one_line(error, limit=120)})"
            )
