"""System metrics of the driver's machine, written to a journal instead of to MLflow.

Import this module only where MLflow may be imported.
"""

import logging
from pathlib import Path

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from lossworks.errors import LossworksError
from lossworks.tracking.journal import Journal, last_step

_logger = logging.getLogger(__name__)


class JournalMonitor(SystemMetricsMonitor):
    """MLflow's sampling of CPU, memory, disk, network and GPUs, with a journal as its target.

    MLflow's own loop asks the server about the run after each sample and ends at the first failure; this
    one needs no server.

    Args:
        run_id: Id of the run.
        uri: Address of the store; MLflow wants it, nothing is sent there.
        path: File of the journal.
    """

    def __init__(self, run_id: str, uri: str, path: Path) -> None:
        super().__init__(run_id, tracking_uri=uri)
        self._journal = Journal.open(path)
        last = last_step(path, self._metrics_prefix)
        self._logging_step = 0 if last is None else last + 1

    def monitor(self) -> None:
        """Sample and write until ``finish`` is called."""
        while not self._shutdown_event.is_set():
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                self._shutdown_event.wait(self.sampling_interval)
            try:
                self.publish_metrics(self.aggregate_metrics())
            except (LossworksError, OSError) as error:
                _logger.warning("system metrics end here: %s", error)
                return

    def publish_metrics(self, metrics: dict[str, float]) -> None:
        """Append one row to the journal."""
        prefix = self._metrics_prefix + (f"{self.node_id}/" if self.node_id else "")
        self._journal.write(self._logging_step, {prefix + name: value for name, value in metrics.items()})
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()

    def finish(self) -> None:
        """Stop sampling; the last, shorter interval is written too."""
        super().finish()
        self._journal.close()
