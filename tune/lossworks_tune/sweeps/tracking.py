"""Trials in MLflow: child runs of the sweep's, made from the trials' folders whichever engine trains."""

from pathlib import Path

from lossworks.errors import RunError
from lossworks.files import write_atomically
from lossworks.runs import RunFolder
from lossworks.tracking import create_run, deliver, finish_run
from lossworks.tracking.store import TrackedStatus
from lossworks_tune.sweeps.ledger import Trial, TrialFolder, TrialsFolder
from lossworks_tune.sweeps.results import Results
from lossworks_tune.sweeps.sweep import Sweep

_STATUS: dict[str, TrackedStatus] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class TrialRuns:
    """The trials' runs in MLflow, which nothing else writes, so that nothing is lost or there twice.

    Args:
        sweep: The sweep.
        folder: Of its run.
    """

    def __init__(self, sweep: Sweep, folder: RunFolder) -> None:
        self._sweep, self._folder = sweep, folder
        self._synced: dict[Path, Trial] = {}

    def sync(self, results: Results) -> None:
        """Enter trials that are new, send what they have reported, and close those that have ended.

        Raises:
            RunError: The store can't be reached; the next call goes on where this one stopped.
        """
        spec = self._sweep.spec
        self._sync_all(self._sweep.trials, results.trials, "trial", spec.seeds)
        again = "trial on fresh seeds"
        self._sync_all(self._sweep.confirmed, results.confirmed, again, spec.confirm.seeds)

    def try_sync(self, results: Results) -> str:
        """Do the same, and return what went wrong in words, or nothing."""
        try:
            self.sync(results)
        except RunError as error:
            return str(error)
        return ""

    def _sync_all(
        self, below: TrialsFolder, trials: tuple[Trial, ...], kind: str, seeds: tuple[int, ...]
    ) -> None:
        for trial in trials:
            folder = below.of(trial.configuration.number)
            if self._synced.get(folder.path) is not trial:  # it is another object where it has changed
                self._sync(folder, trial, kind, seeds)
                self._synced[folder.path] = trial

    def _sync(self, folder: TrialFolder, trial: Trial, kind: str, seeds: tuple[int, ...]) -> None:
        closed = folder.path / "tracked"
        if closed.is_file():
            return
        tracking = self._sweep.spec.tracking
        if not folder.run_id_file.is_file():
            write_atomically(folder.run_id_file, self._create(trial, kind, seeds))
        run_id = folder.run_id_file.read_text(encoding="ascii")
        deliver(tracking, run_id, folder.journal)
        if trial.status != "running":
            artifacts = [folder.configuration_file, *folder.path.glob("seed-*/report.png")]
            status, reason = _STATUS[trial.status], trial.reason or None
            finish_run(tracking, run_id, status, artifacts=artifacts, reason=reason)
            closed.touch()

    def _create(self, trial: Trial, kind: str, seeds: tuple[int, ...]) -> str:
        configuration = trial.configuration
        values = self._sweep.space.training(configuration.fields, seeds[0]).flat()
        values["seeds" if "seed" not in values else "seed"] = list(seeds)
        tags = {"lossworks.kind": kind}
        name = f"{configuration.number:05d} {configuration.title}"
        parent, tracking = self._folder.run_id, self._sweep.spec.tracking
        return create_run(tracking, name=name[:250], parameters=values, tags=tags, parent=parent)
