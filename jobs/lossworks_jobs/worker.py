"""What Ray runs in each worker: the plain training loop with a journal beside it."""

from pathlib import Path
from typing import Any

# Ray's controller imports this module too: torch and all that needs it stay inside the function.


def run_worker(config: dict[str, Any]) -> None:
    """Take part in a run as one rank; rank 0 leaves the outcome in the run's folder.

    Args:
        config: ``spec`` (as plain data), ``folder`` (of the run), ``corpus`` (folder of tokens, or None)
            and ``threads`` (CPUs of this worker).
    """
    import torch

    from lossworks.data import TokenizedCorpus
    from lossworks.errors import UserError
    from lossworks.runs import RunFolder
    from lossworks.specs import parse_train_spec
    from lossworks.tracking import Journal
    from lossworks.training.checkpoint import CheckpointStore
    from lossworks.training.loop import Job, train
    from lossworks.training.outcome import Outcome
    from lossworks.training.world import World

    torch.set_num_threads(config["threads"])
    spec, folder = parse_train_spec(config["spec"]), RunFolder(Path(config["folder"]))
    leads = World.current().leads
    journal = Journal.open(folder.journal) if leads else None
    try:
        outcome = train(
            Job(
                spec=spec,
                corpus=TokenizedCorpus.open(Path(config["corpus"])) if config["corpus"] else None,
                checkpoints=CheckpointStore(folder.checkpoints, keep=spec.checkpoint.keep),
                record=journal.write if journal else _ignore,
                notify=folder.notify,
                stop_requested=folder.stop_file.exists,
            )
        )
    except UserError as error:
        # All ranks read the same spec and so fail alike; raising would only make Ray try again.
        outcome = Outcome("failed", str(error), 0, {}, None, None)
    finally:
        if journal:
            journal.close()
    if leads:
        outcome.write(folder.outcome_file)


def _ignore(step: int, metrics: dict[str, float]) -> None:
    """Record nothing: rank 0 does."""
