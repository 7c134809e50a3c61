"""An analysis of runs that have ended: measured, drawn, and kept beside them and in MLflow."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lossworks.catalogue.registry import create, declaration
from lossworks.data.batch import Batch
from lossworks.errors import RunError, UserError
from lossworks.models import Outputs
from lossworks.reporting.finish import curves_of
from lossworks.runs import RunFolder
from lossworks.tasks.analyses import Analysis, Finding, RunCurves
from lossworks.tasks.registry import task_of
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import analysed
from lossworks.training.roles import Roles
from lossworks.training.weights.start import begin_from, learnt_by, trained_weights


@dataclass(frozen=True)
class Analysed:
    """An analysis that was made.

    Attributes:
        finding: What it found.
        files: Figures as JSON, and the picture if there is one.
        complaint: Why MLflow has not got them, or nothing.
    """

    finding: Finding
    files: tuple[Path, ...]
    complaint: str = ""


def analyse(
    name: str, folders: Sequence[RunFolder], settings: Mapping[str, Any], *, to: Path | None = None
) -> Analysed:
    """Analyse a trained model, or compare runs.

    Args:
        name: Slug of the analysis.
        folders: One run for an analysis of models, any number for one of runs.
        settings: Hyperparameters of the analysis.
        to: Folder for the files; the first run's if None.

    Raises:
        UserError: There is no such analysis, or it can't be made of these runs.
    """
    if declaration(name).kind != "analysis":
        raise UserError(f"{name}: is no analysis; `lossworks analyses` lists them")
    analysis: Analysis = create(name, **settings)
    if analysis.subject == "runs":
        finding = analysis.compare([_curves(folder) for folder in folders])
    elif len(folders) > 1:
        raise UserError(f"{name}: analyses one trained model; give one run, not {len(folders)}")
    else:
        finding = of_model(analysis, folders[0])
    files = _write(analysis, finding, folders, to or folders[0].path)
    return Analysed(finding, files, _deliver(folders[0], files))


def of_model(analysis: Analysis, folder: RunFolder) -> Finding:
    """Return what an analysis of models finds of a run's best checkpoint, on the run's own data."""
    spec = folder.spec()
    kind = task_of(spec)
    analysis.check(kind, spec)
    task = kind.open(spec, None, learnt_by(folder))
    weights = trained_weights(str(folder.path), "run")
    model = task.empty_model(weights.model)
    begin_from(weights, model)
    world = World.current()
    if missing := [role for role in analysis.roles if role not in spec.roles]:
        raise UserError(f"{analysis.slug}: reads a companion named {missing[0]}, which the run has not")
    roles = Roles(spec, task, model, world) if analysis.roles else None

    def completed(batch: Batch) -> tuple[Batch, dict[str, Outputs]]:
        return batch, roles.outputs(batch) if roles else {}

    return analysed(
        model,
        task,
        world,
        analysis,
        limit=spec.evaluation.sequences,
        micro_batch_size=spec.rows_at_once,
        bf16=False,
        completed=completed,
    )


def _curves(folder: RunFolder) -> RunCurves:
    spec = folder.spec()
    if not folder.journal.is_file():
        raise UserError(f"run {folder.run_id}: has recorded nothing yet")
    curves = {name: (steps.tolist(), values.tolist()) for name, (steps, values) in curves_of(folder).items()}
    return RunCurves(f"{spec.name} {folder.run_id[:8]}", spec, curves)


def _write(analysis: Analysis, finding: Finding, folders: Sequence[RunFolder], to: Path) -> tuple[Path, ...]:
    to.mkdir(parents=True, exist_ok=True)
    figures = to / f"{analysis.slug}.json"
    runs = [folder.run_id for folder in folders]
    plain = {"analysis": analysis.slug, "settings": analysis.settings(), "runs": runs, **asdict(finding)}
    figures.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    figure = analysis.draw(finding.pictured, {}) if finding.pictured else None
    if figure is None:
        return (figures,)
    picture = to / f"{analysis.slug}.png"
    figure.savefig(picture, format="png", facecolor="white")
    return figures, picture


def _deliver(folder: RunFolder, files: Sequence[Path]) -> str:
    """Bring the files to the run in MLflow; return why that failed, or nothing."""
    from lossworks.tracking.store import add_artifacts

    try:
        add_artifacts(folder.spec().tracking, folder.run_id, files)
    except RunError as error:
        return f"MLflow has not got the files: {error}"
    return ""
