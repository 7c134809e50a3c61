"""What Ray runs in each worker: the plain training loop with a journal, logs and metrics beside it."""

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.errors import RunError, StorageError, UserError

if TYPE_CHECKING:
    from lossworks.runs import RunFolder
    from lossworks.tracking import Journal
    from lossworks.training.distributed.world import World

UNSHARED = "unshared"
"""Under this name workers report that a node misses something of the driver's; they report nothing else."""

# Ray's controller imports this module too: torch and all that needs it stay inside the function.


def run_ray_worker(config: dict[str, Any]) -> None:
    """Take part in a run as one rank; rank 0 leaves the outcome in the run's folder.

    Args:
        config: ``spec`` (as plain data), ``folder`` (of the run), ``prepared`` (folder of the task, or None)
            and ``threads`` (CPUs of this worker).

    Raises:
        RunError: The journal can't be written.
    """
    import ray.train
    import ray.util
    import torch

    from lossworks.files import write_atomically
    from lossworks.logs import writing_logs
    from lossworks.runs import RunFolder
    from lossworks.training.distributed.world import World

    torch.set_num_threads(config["threads"])
    folder, world = RunFolder(Path(config["folder"])), World.current()
    # First of all: what is written below would make folders, and hide that they are not the driver's.
    complaint = unshared(
        world, [folder.spec_file, *([Path(config["prepared"])] if config["prepared"] else [])]
    )
    if complaint:
        # Raised, it would only make Ray try again; and what is written here may never get to the driver.
        ray.train.report({UNSHARED: complaint})
        return
    group = ray.util.get_current_placement_group()
    if world.rank == 0 and group is not None:
        write_atomically(folder.placement_file, group.id.hex())
    with writing_logs(folder.logs, run=folder.run_id, who=world.rank, echo=True):
        _take_part(config, folder, world.rank)


def _take_part(config: dict[str, Any], folder: "RunFolder", rank: int) -> None:
    """Train, and journal and export what is measured."""
    from lossworks.logs import EVENTS
    from lossworks.tasks import parse_train_spec
    from lossworks.tracking import Journal
    from lossworks.training.checkpoints.checkpoint import CheckpointStore
    from lossworks.training.checkpoints.mirror import CheckpointMirror
    from lossworks.training.job import Job
    from lossworks.training.loop import train
    from lossworks.training.outcome import Outcome, RunStatus
    from lossworks.training.weights.start import learnt_by
    from lossworks_jobs.training.prometheus import Exporter

    spec = parse_train_spec(config["spec"])
    journal = Journal.open(folder.journal) if rank == 0 else None
    exporter = Exporter(run=folder.run_id, name=spec.name, rank=rank)
    patience_s = spec.checkpoint.patience_s

    def record(step: int, metrics: dict[str, float]) -> None:
        if journal:
            _write(journal, step, metrics, patience_s)
        exporter.record(metrics)

    try:
        outcome = train(
            Job(
                spec=spec,
                prepared=Path(config["prepared"]) if config["prepared"] else None,
                checkpoints=CheckpointStore(
                    folder.checkpoints,
                    keep=spec.checkpoint.keep,
                    patience_s=patience_s,
                    notify=folder.notify,
                    mirror=CheckpointMirror.of(spec, folder.run_id),
                ),
                record=record,
                notify=folder.notify,
                watch=lambda _, metrics: exporter.watch(metrics),
                profile=folder.profile,
                results=folder.results,
                learnt=learnt_by(folder),
                stop_requested=folder.stop_file.exists,
            )
        )
    except (UserError, StorageError) as error:
        # All ranks fail alike, for the same spec or after the same patience; raising would only make Ray try
        # again. Where a disk is full the small file that says so mostly still fits.
        EVENTS.error("%s", error)
        status: RunStatus = "failed" if isinstance(error, UserError) else "storage"
        outcome = Outcome(status, str(error), 0, {}, None, None)
    except Exception:
        EVENTS.exception("failed")
        raise
    finally:
        if journal:
            journal.close()
    if rank == 0:
        outcome.write(folder.outcome_file)


def unshared(world: "World", paths: list[Path]) -> str | None:
    """Return, on every rank, what the node of the first that misses something of the driver's lacks."""
    missing = next((path for path in paths if not path.exists()), None)
    return world.first(
        f"{missing}: can't be seen on node {platform.node()}; all nodes must share runs and caches: set "
        "storage and LOSSWORKS_HOME to folders on shared storage"
        if missing
        else None
    )


def _write(journal: "Journal", step: int, metrics: dict[str, float], patience_s: float) -> None:
    """Append a row; while storage refuses, try again for ``patience_s`` seconds, in which all ranks wait."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            journal.write(step, metrics)
        except RunError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return
