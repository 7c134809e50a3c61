"""Trials in MLflow: child runs of the sweep's, made from the trials' folders whichever engine trains."""

from pathlib import Path

from lossworks.errors import RunError
from lossworks.runs import RunFolder
from lossworks.tracking import create_run, deliver, finish_run
from lossworks.tracking.store import Status
from lossworks_tune.ledger import TrialFolder, folders
from lossworks_tune.results import CONFIRMED, TRIALS
from lossworks_tune.space import Space
from lossworks_tune.specs import SweepSpec

_STATUS: dict[str, Status] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Children:
    """Brings trials to MLflow: the only writer of their runs, so that nothing is lost or there twice.

    Args:
        spec: The sweep.
        space: What it searches.
        folder: Of the sweep's run.
    """

    def __init__(self, spec: SweepSpec, space: Space, folder: RunFolder) -> None:
        self._spec, self._space, self._folder = spec, space, folder
        self._done: set[Path] = set()

    def sync(self) -> None:
        """Enter trials that are new, send what they have reported, and close those that have ended.

        Raises:
            RunError: The store can't be reached; the next call goes on where this one stopped.
        """
        for kind in (TRIALS, CONFIRMED):
            for trial in folders(self._folder.path / kind):
                if trial.path not in self._done:
                    self._sync(trial, kind)

    def _sync(self, trial: TrialFolder, kind: str) -> None:
        closed = trial.path / "tracked"
        if closed.is_file():
            self._done.add(trial.path)
            return
        end = trial.end  # read first: what was reported before it is there
        tracking = self._spec.tracking
        if not trial.run_id_file.is_file():
            partial = trial.run_id_file.with_suffix(".partial")
            partial.write_text(self._create(trial, kind), encoding="ascii")
            partial.replace(trial.run_id_file)
        run_id = trial.run_id_file.read_text(encoding="ascii")
        deliver(tracking, run_id, trial.journal)
        if end is not None:
            artifacts = [trial.configuration_file, *trial.path.glob("seed-*/report.png")]
            finish_run(tracking, run_id, _STATUS[end.status], artifacts=artifacts, reason=end.reason or None)
            closed.touch()
            self._done.add(trial.path)

    def _create(self, trial: TrialFolder, kind: str) -> str:
        configuration = trial.configuration
        seeds = self._spec.seeds if kind == TRIALS else self._spec.confirm.seeds
        values = self._space.training(configuration.fields, seeds[0]).flat()
        values["seeds" if "seed" not in values else "seed"] = list(seeds)
        tags = {"lossworks.kind": "trial" if kind == TRIALS else "trial on fresh seeds"}
        name = f"{configuration.number:05d} {configuration.title}"
        parent = self._folder.run_id
        return create_run(self._spec.tracking, name=name[:250], parameters=values, tags=tags, parent=parent)


def close(spec: SweepSpec, folder: RunFolder, status: Status, artifacts: list[Path], reason: str) -> None:
    """Store a sweep's artifacts and its status.

    Raises:
        RunError: The store is away.
    """
    tags = {"lossworks.folder": str(folder.path)}
    files = [path for path in [folder.spec_file, *artifacts] if path.is_file()]
    finish_run(spec.tracking, folder.run_id, status, artifacts=files, tags=tags, reason=reason or None)


def safely(children: Children) -> str:
    """Bring trials to MLflow and return what went wrong, in words, or nothing."""
    try:
        children.sync()
    except RunError as error:
        return str(error)
    return ""
