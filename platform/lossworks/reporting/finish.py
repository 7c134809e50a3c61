"""The end of a run: its picture, its artifacts and its status in MLflow."""

from pathlib import Path

from lossworks.runs import RunFolder
from lossworks.specs import ClassifierSpec
from lossworks.tracking import Row, deliver, finish_run, read_all
from lossworks.tracking.store import Status
from lossworks.training.outcome import Outcome

TRACKED_STATUS: dict[str, Status] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "diverged": "FAILED",
    "failed": "FAILED",
}


def draw_report(folder: RunFolder, vocabulary: int | None = None) -> Path:
    """Draw ``report.png`` from the run's journal and outcome, and return its path."""
    from lossworks.reporting.train_report import train_report

    rows: list[Row] = read_all(folder.journal)
    outcome = Outcome.read(folder.outcome_file) if folder.outcome_file.is_file() else None
    spec = folder.spec()
    plain = spec.loss.name == "cross-entropy"
    row = "example" if isinstance(spec, ClassifierSpec) else "token"
    return train_report(
        rows,
        head_memory=outcome.head_memory if outcome else None,
        reliability=outcome.reliability if outcome else None,
        title=f"{spec.name} · {folder.run_id[:8]}",
        path=folder.report,
        vocabulary=vocabulary if plain else None,
        loss=f"nats per {row}" if plain else f"{spec.loss.name} per {row}",
    )


def finish_run_folder(
    folder: RunFolder, vocabulary: int | None, *, status: Status, reason: str | None
) -> None:
    """Draw the report, store report, spec and outcome as artifacts, and set the run's final status.

    Raises:
        RunError: The tracking store can't be reached; everything stays in the folder for ``lossworks sync``.
    """
    artifacts = [folder.spec_file]
    if folder.journal.is_file():
        artifacts.append(draw_report(folder, vocabulary))
    if folder.outcome_file.is_file():
        artifacts.append(folder.outcome_file)
    tags = {"lossworks.folder": str(folder.path), "lossworks.checkpoints": str(folder.checkpoints)}
    finish_run(folder.spec().tracking, folder.run_id, status, artifacts=artifacts, tags=tags, reason=reason)


def sync_run(folder: RunFolder) -> int:
    """Bring a run that has ended up to date in MLflow after an outage; return the rows delivered.

    Raises:
        RunError: The tracking store still can't be reached.
    """
    delivered = deliver(folder.spec().tracking, folder.run_id, folder.journal)
    outcome = Outcome.read(folder.outcome_file) if folder.outcome_file.is_file() else None
    status = TRACKED_STATUS[outcome.status] if outcome else "KILLED"
    finish_run_folder(folder, None, status=status, reason=outcome.reason if outcome else None)
    return delivered
