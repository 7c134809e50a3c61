"""What a process needs to take part in a run, whoever started it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lossworks.data.learnt import Learnt
from lossworks.specs import RunSpec
from lossworks.training.checkpoints.checkpoint import CheckpointStore

Record = Callable[[int, dict[str, float]], object]
Notify = Callable[[str], object]


def _say_nothing(_: str) -> None:
    """Take a notice nobody wants."""


def _watch_nothing(_step: int, _metrics: dict[str, float]) -> None:
    """Take figures nobody wants."""


@dataclass(frozen=True)
class Job:
    """What a process needs to take part in a run.

    Attributes:
        spec: The run.
        prepared: Folder that the task made for all workers, such as tokens; None if it made none.
        learnt: What the run has learnt from its data before; None where that is read off them now.
        checkpoints: Where the run's checkpoints are, on storage that all ranks share.
        record: Called by rank 0 with a step and its metrics; must not block.
        notify: Called by rank 0 with a sentence that a person should see.
        watch: Called by every rank with a step and what it has measured of itself; must not block.
        profile: Folder for the trace of the steps that the spec profiles; None for no profile.
        results: Folder for what methods make for use after training; None to keep nothing.
        stop_requested: Asked by rank 0 after every step; when true the run saves a checkpoint and ends.
    """

    spec: RunSpec
    prepared: Path | None
    checkpoints: CheckpointStore
    record: Record
    notify: Notify = _say_nothing
    watch: Record = _watch_nothing
    profile: Path | None = None
    results: Path | None = None
    learnt: Learnt | None = None
    stop_requested: Callable[[], bool] = lambda: False
