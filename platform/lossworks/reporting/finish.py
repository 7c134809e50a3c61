"""The end of a run: its picture, its artifacts, its model and its status in MLflow."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from lossworks.reporting.series import series
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
    "storage": "FAILED",
}


def draw_report(folder: RunFolder, vocabulary: int | None = None) -> Path:
    """Draw ``report.png`` from the run's journal and outcome, and return its path."""
    from lossworks.reporting.train_report import train_report

    spec = folder.spec()  # first, since it refuses runs of other rooms
    rows: list[Row] = read_all(folder.journal)
    outcome = Outcome.read(folder.outcome_file) if folder.outcome_file.is_file() else None
    plain = spec.loss.name == "cross-entropy"
    row = "example" if isinstance(spec, ClassifierSpec) else "token"
    return train_report(
        rows,
        head_memory=outcome.head_memory if outcome else None,
        reliability=outcome.reliability if outcome else None,
        seconds=outcome.seconds if outcome else None,
        title=f"{spec.name} · {folder.run_id[:8]}",
        path=folder.report,
        vocabulary=vocabulary if plain else None,
        loss=f"nats per {row}" if plain else f"{spec.loss.name} per {row}",
    )


def draw_telemetry(folder: RunFolder) -> Path | None:
    """Draw ``telemetry.png`` from the run's journal; return its path, or None without telemetry."""
    from lossworks.reporting.telemetry_report import telemetry_report

    title = f"{folder.spec().name} · {folder.run_id[:8]} · {folder.spec().loss.name} within"
    return telemetry_report(read_all(folder.journal), title=title, path=folder.telemetry)


def draw_flame(folder: RunFolder) -> Path | None:
    """Draw ``flame.svg`` and ``flame.png`` of a profiled run; return their folder, or None without."""
    trace = folder.profile / "trace.json.gz"
    if not trace.is_file():
        return None
    from lossworks.reporting.flame import boxes, read_calls
    from lossworks.reporting.flame_drawing import write_png, write_svg

    calls = read_calls(trace)
    title = f"{folder.spec().name} · {folder.run_id[:8]} · {calls.count} steps, {calls.total / 1000:,.1f} ms"
    found = list(boxes(calls))
    write_svg(found, title=title, path=folder.profile / "flame.svg")
    write_png(found, title=title, path=folder.profile / "flame.png")
    return folder.profile


def draw_collapse(folder: RunFolder) -> Path | None:
    """Draw ``collapse.png`` from the run's journal and outcome; return its path, or None if not measured."""
    if not folder.outcome_file.is_file():
        return None
    matrices = Outcome.read(folder.outcome_file).collapse
    if not matrices:
        return None
    import torch

    from lossworks.entries.analyses.neural_collapse import MATRICES, Grams
    from lossworks.losses import create

    kinds = [
        [torch.tensor(matrices[f"{which} {name}"]) for which in ("found", "predicted")] for name in MATRICES
    ]
    found, predicted = (Grams(*matrices) for matrices in zip(*kinds, strict=True))
    rows = read_all(folder.journal)
    names = ("nc1", "nc2_classifier", "nc2_features", "nc3", "nc4")
    curves = {name: points for name in names if (points := series(rows, f"eval/{name}")) is not None}
    create("neural-collapse").draw(found, predicted, curves).savefig(folder.collapse)
    return folder.collapse


def finish_run_folder(
    folder: RunFolder,
    vocabulary: int | None,
    *,
    status: Status,
    reason: str | None,
    notify: Callable[[str], None],
) -> None:
    """Draw the report, store report, spec, outcome and model, and set the run's final status.

    Args:
        folder: The run.
        vocabulary: Classes, whose uniform loss is drawn as a line; None for none.
        status: How it ended; only of a run that finished the model is logged.
        reason: Why it failed.
        notify: Called with a sentence if the model can't be logged, which is no reason to fail the run.

    Raises:
        RunError: The tracking store can't be reached; everything stays in the folder for ``lossworks sync``.
    """
    artifacts = [folder.spec_file]
    if folder.journal.is_file():
        artifacts.append(draw_report(folder, vocabulary))
        artifacts += [
            path for draw in (draw_telemetry, draw_collapse, draw_flame) if (path := draw(folder)) is not None
        ]
    artifacts += [path for path in (folder.outcome_file, folder.logs) if path.exists()]
    if status == "FINISHED" and folder.spec().tracking.logs_model:
        _log_model(folder, notify)
    tags = {"lossworks.folder": str(folder.path), "lossworks.checkpoints": str(folder.checkpoints)}
    finish_run(folder.spec().tracking, folder.run_id, status, artifacts=artifacts, tags=tags, reason=reason)


def _log_model(folder: RunFolder, notify: Callable[[str], None]) -> None:
    """Log the best checkpoint's model, unless that has been done, and register it if the spec says so."""
    from lossworks.tracking.models.logged_models import log_model, logged_step
    from lossworks.training.export import choose_checkpoint, export_run

    tracking = folder.spec().tracking
    try:
        if logged_step(tracking, folder.run_id) == choose_checkpoint(folder).step:
            return
        # Beside the checkpoints, where there is room for a model, which may not be so in /tmp.
        with tempfile.TemporaryDirectory(dir=folder.path, prefix=".model-") as temporary:
            exported = Path(temporary) / "model"
            step = export_run(folder, exported)
            log_model(tracking, folder.run_id, exported, step=step)
    except Exception as error:  # noqa: BLE001  (the run itself has finished, whatever this is)
        notify(f"the model could not be logged: {error}")


def sync_run(folder: RunFolder, notify: Callable[[str], None]) -> int:
    """Bring a run that has ended up to date in MLflow after an outage; return the rows delivered.

    Args:
        folder: The run.
        notify: Called with a sentence if the model can't be logged.

    Raises:
        RunError: The tracking store still can't be reached.
    """
    delivered = deliver(folder.spec().tracking, folder.run_id, folder.journal)
    outcome = Outcome.read(folder.outcome_file) if folder.outcome_file.is_file() else None
    status = TRACKED_STATUS[outcome.status] if outcome else "KILLED"
    reason = outcome.reason if outcome else None
    finish_run_folder(folder, None, status=status, reason=reason, notify=notify)
    return delivered
