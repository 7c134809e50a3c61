"""Training runs as a sweep varies them: each a run of Ray Train, in a folder of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.errors import RunError, UserError, redact
from lossworks.runs import RunFolder
from lossworks.specs import RunSpec
from lossworks.tasks.registry import parse_train_spec, task_of
from lossworks.trainables import Direction, StepReport, Trainable

if TYPE_CHECKING:
    from lossworks.tasks.interface import Simplest

_OWN: dict[str, Direction] = {"eval/loss": "min", "train/loss": "min"}


def _parse(values: Mapping[str, Any], source: str) -> RunSpec:
    spec = parse_train_spec(values, source=source)
    if spec.checkpoint.mirror is not None:
        raise UserError(
            f"{source}: checkpoint.mirror={redact(spec.checkpoint.mirror)}: is for `lossworks train`; trials "
            "keep their checkpoints in the sweep's folder"
        )
    return spec


def _seeded(values: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {**values, "seed": seed}


def _steps(spec: RunSpec) -> int:
    return spec.steps


def _cpus(spec: RunSpec) -> float:
    return spec.workers * spec.resources_per_worker.get("CPU", 1.0)


def _yardsticks(spec: RunSpec) -> Mapping[str, Direction]:
    return {**task_of(spec).measured_by(spec), **_OWN}


def _train(spec: RunSpec, path: Path, report: StepReport) -> None:
    from lossworks.tracking import rows_while
    from lossworks.training.weights.start import learnt_of_start, settled
    from lossworks_jobs.training.fitting import fit, read_outcome

    spec = settled(spec)
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    folder.store(spec)
    prepared = task_of(spec).prepare(spec, None, learnt_of_start(spec))
    if prepared.learnt is not None and not folder.learnt.exists():
        prepared.learnt.write(folder.learnt)
    folder.outcome_file.unlink(missing_ok=True)
    work = _train_here if _is_alone(spec) else fit
    for row in rows_while(folder.journal, lambda: work(spec, folder, prepared.folder)):
        # Checkpoints are evaluated, too; schedulers count on what comes at the spec's own pace.
        if row["step"] % spec.evaluation.every == 0 or row["step"] == spec.steps:
            report(row["step"], row["metrics"])
    outcome = read_outcome(folder)
    if outcome.status != "finished":
        raise RunError(outcome.reason)


def _is_alone(spec: RunSpec) -> bool:
    """Return whether a run is one process without a GPU, which needs none of what Ray Train does."""
    return spec.workers == 1 and spec.sharding.kind == "none" and not spec.resources_per_worker.get("GPU", 0)


def _train_here(spec: RunSpec, folder: RunFolder, prepared: Path | None) -> None:
    """Train in this process, which is a trial's own: starting another one takes longer than many trainings.

    Args:
        spec: The run.
        folder: Where it goes on from, and leaves its journal and outcome.
        prepared: Folder that the task made; None if it made none.
    """
    import torch

    from lossworks.tracking import Journal
    from lossworks.training.checkpoints.checkpoint import CheckpointStore
    from lossworks.training.job import Job
    from lossworks.training.loop import train
    from lossworks.training.weights.start import learnt_by
    from lossworks_jobs.clusters.ray_cluster import threads

    torch.set_num_threads(threads(spec))
    with Journal.open(folder.journal) as journal:
        store = CheckpointStore(
            folder.checkpoints, keep=spec.checkpoint.keep, patience_s=spec.checkpoint.patience_s
        )
        job = Job(spec, prepared, store, journal.write, results=folder.results, learnt=learnt_by(folder))
        outcome = train(job)
    outcome.write(folder.outcome_file)


def _release(path: Path) -> None:
    from lossworks_jobs.training.fitting import release

    for folder in path.iterdir() if path.is_dir() else ():
        release(RunFolder(folder))


def _simplest(spec: RunSpec) -> "Simplest | None":
    return task_of(spec).prepare(spec).simplest


TRAINABLE = Trainable(
    parse=_parse,
    seeded=_seeded,
    steps=_steps,
    cpus=_cpus,
    yardsticks=_yardsticks,
    train=_train,
    starts_workers=True,
    release=_release,
    simplest=_simplest,
)
