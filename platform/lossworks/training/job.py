"""What a process needs to take part in a run, whoever started it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lossworks.data import TokenizedCorpus
from lossworks.specs import AnyTrainSpec
from lossworks.training.checkpoint import CheckpointStore

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
        corpus: The tokenised text of a language model; None for classifiers.
        checkpoints: Where the run's checkpoints are, on storage that all ranks share.
        record: Called by rank 0 with a step and its metrics; must not block.
        notify: Called by rank 0 with a sentence that a person should see.
        watch: Called by every rank with a step and what it has measured of itself; must not block.
        profile: Folder for the trace of the steps that the spec profiles; None for no profile.
        stop_requested: Asked by rank 0 after every step; when true the run saves a checkpoint and ends.
    """

    spec: AnyTrainSpec
    corpus: TokenizedCorpus | None
    checkpoints: CheckpointStore
    record: Record
    notify: Notify = _say_nothing
    watch: Record = _watch_nothing
    profile: Path | None = None
    stop_requested: Callable[[], bool] = lambda: False
