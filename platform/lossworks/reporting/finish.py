"""The end of a run: its picture, its artifacts, its model and its status in MLflow."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from lossworks.catalogue.registry import create
from lossworks.reporting.series import Series, series
from lossworks.runs import RunFolder
from lossworks.tasks.registry import task_of
from lossworks.tracking import JournalRow, deliver, finish_run, read_all
from lossworks.tracking.store import TrackedStatus
from lossworks.training.outcome import Outcome

TRACKED_STATUS: dict[str, TrackedStatus] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "storage": "FAILED",
}


def draw_report(folder: RunFolder, guess: float | None = None) -> Path:
    """Draw ``report.png`` from the run's journal and outcome, and return its path."""
    from lossworks.reporting.train_report import train_report

    spec = folder.spec()  # first, since it refuses runs of other rooms
    rows: list[JournalRow] = read_all(folder.journal)
    outcome = Outcome.stored(folder.outcome_file)
    plain = spec.loss.titles == ("cross-entropy",)
    kind = task_of(spec)
    row = kind.element_of(spec)
    return train_report(
        rows,
        head_memory=outcome.head_memory if outcome else None,
        task=kind,
        pictured=outcome.pictured if outcome else {},
        seconds=outcome.seconds if outcome else None,
        title=f"{spec.name} · {folder.run_id[:8]}",
        path=folder.report,
        guess=guess if plain else None,
        loss=f"nats per {row}" if plain else f"{' + '.join(spec.loss.titles)} per {row}",
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
    from lossworks.reporting.flames.flame import boxes, read_calls
    from lossworks.reporting.flames.flame_drawing import write_png, write_svg

    calls = read_calls(trace)
    title = f"{folder.spec().name} · {folder.run_id[:8]} · {calls.count} steps, {calls.total / 1000:,.1f} ms"
    found = list(boxes(calls))
    write_svg(found, title=title, path=folder.profile / "flame.svg")
    write_png(found, title=title, path=folder.profile / "flame.png")
    return folder.profile


def draw_analyses(folder: RunFolder) -> list[Path]:
    """Draw what analyses measured with each evaluation, from the run's journal and outcome."""
    outcome = Outcome.stored(folder.outcome_file)
    pictured = outcome.pictured if outcome else {}
    curves = curves_of(folder)
    drawn = []
    for analysis in folder.spec().analyses:
        if analysis.name not in pictured:
            continue
        own = {name.removeprefix("eval/"): points for name, points in curves.items()}
        figure = create(analysis.name, **analysis.hyperparameters).draw(pictured[analysis.name], own)
        if figure is not None:
            figure.savefig(folder.picture(analysis.name), facecolor="white")
            drawn.append(folder.picture(analysis.name))
    return drawn


def curves_of(folder: RunFolder) -> dict[str, Series]:
    """Return steps and values of every figure in a run's journal, by tracked name."""
    rows = read_all(folder.journal)
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return {name: points for name in names if (points := series(rows, name)) is not None}


def finish_run_folder(
    folder: RunFolder,
    guess: float | None,
    *,
    status: TrackedStatus,
    reason: str | None,
    notify: Callable[[str], None],
) -> None:
    """Draw the report, store report, spec, outcome and model, and set the run's final status.

    Args:
        folder: The run.
        guess: The loss of a uniform guess, which is drawn as a line; None for none.
        status: How it ended; only of a run that finished the model is logged.
        reason: Why it failed.
        notify: Called with a sentence if the model can't be logged, which is no reason to fail the run.

    Raises:
        RunError: The tracking store can't be reached; everything stays in the folder for ``lossworks sync``.
    """
    artifacts = [folder.spec_file]
    if folder.journal.is_file():
        report = draw_report(folder, guess)
        artifacts += [report, report.with_suffix(".svg")]
        artifacts += [path for draw in (draw_telemetry, draw_flame) if (path := draw(folder)) is not None]
        artifacts += draw_analyses(folder)
    artifacts += [path for path in (folder.outcome_file, folder.logs, folder.results) if path.exists()]
    if status == "FINISHED" and folder.spec().tracking.logs_model:
        _log_model(folder, notify)
    tags = {"lossworks.folder": str(folder.path), "lossworks.checkpoints": str(folder.checkpoints)}
    finish_run(folder.spec().tracking, folder.run_id, status, artifacts=artifacts, tags=tags, reason=reason)


def _log_model(folder: RunFolder, notify: Callable[[str], None]) -> None:
    """Log the best checkpoint's model, unless that has been done, and register it if the spec says so."""
    from lossworks.tracking.models.logged_models import log_model, logged_step
    from lossworks.training.weights.export import export_run
    from lossworks.training.weights.start import choose_checkpoint

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
    outcome = Outcome.stored(folder.outcome_file)
    status = TRACKED_STATUS[outcome.status] if outcome else "KILLED"
    reason = outcome.reason if outcome else None
    finish_run_folder(folder, None, status=status, reason=reason, notify=notify)
    return delivered
