"""What Ray runs in each worker: the plain training loop with a journal beside it."""

import platform
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.errors import RunError, UserError

if TYPE_CHECKING:
    from lossworks.tracking import Journal
    from lossworks.training.world import World

# Ray's controller imports this module too: torch and all that needs it stay inside the function.


def run_worker(config: dict[str, Any]) -> None:
    """Take part in a run as one rank; rank 0 leaves the outcome in the run's folder.

    Args:
        config: ``spec`` (as plain data), ``folder`` (of the run), ``corpus`` (folder of tokens, or None)
            and ``threads`` (CPUs of this worker).
    """
    import torch

    from lossworks.data import TokenizedCorpus
    from lossworks.errors import StorageError
    from lossworks.runs import RunFolder
    from lossworks.specs import parse_train_spec
    from lossworks.tracking import Journal
    from lossworks.training.checkpoint import CheckpointStore
    from lossworks.training.loop import Job, train
    from lossworks.training.outcome import Outcome
    from lossworks.training.world import World

    torch.set_num_threads(config["threads"])
    spec, folder = parse_train_spec(config["spec"]), RunFolder(Path(config["folder"]))
    world = World.current()
    leads, patience_s = world.leads, spec.checkpoint.patience_s
    journal = Journal.open(folder.journal) if leads else None
    try:
        _require_shared(world, [folder.path, *([Path(config["corpus"])] if config["corpus"] else [])])
        outcome = train(
            Job(
                spec=spec,
                corpus=TokenizedCorpus.open(Path(config["corpus"])) if config["corpus"] else None,
                checkpoints=CheckpointStore(
                    folder.checkpoints,
                    keep=spec.checkpoint.keep,
                    patience_s=patience_s,
                    notify=folder.notify,
                ),
                record=partial(_write, journal, patience_s) if journal else _ignore,
                notify=folder.notify,
                stop_requested=folder.stop_file.exists,
            )
        )
    except UserError as error:
        # All ranks read the same spec and so fail alike; raising would only make Ray try again.
        outcome = Outcome("failed", str(error), 0, {}, None, None)
    except StorageError as error:
        # Trying again is over; where a disk is full the small file that says so mostly still fits.
        outcome = Outcome("storage", str(error), 0, {}, None, None)
    finally:
        if journal:
            journal.close()
    if leads:
        outcome.write(folder.outcome_file)


def _require_shared(world: "World", paths: list[Path]) -> None:
    """Check that this node sees what the driver wrote.

    Raises:
        UserError: On every rank, if one does not.
    """
    missing = next((path for path in paths if not path.is_dir()), None)
    complaint = world.first(
        f"{missing}: can't be seen on node {platform.node()}; all nodes must share runs and caches: set "
        "storage and LOSSWORKS_HOME to folders on shared storage"
        if missing
        else None
    )
    if complaint:
        raise UserError(complaint)


def _write(journal: "Journal", patience_s: float, step: int, metrics: dict[str, float]) -> None:
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


def _ignore(step: int, metrics: dict[str, float]) -> None:
    """Record nothing: rank 0 does."""
