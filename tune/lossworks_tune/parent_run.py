"""The run of a sweep or study in MLflow, below which stand those of its trainings."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lossworks.errors import LossworksError, RunError
from lossworks.runs import RunFolder
from lossworks.specs import TrackingSpec
from lossworks.tracking import create_run, deliver, finish_run, open_run
from lossworks.tracking.store import TrackedStatus


class ParentSpec(Protocol):
    """What is needed of the spec of a sweep or study."""

    @property
    def name(self) -> str:
        """Name of the run."""

    @property
    def storage(self) -> str | None:
        """Folder of runs."""

    @property
    def tracking(self) -> TrackingSpec:
        """Where it is tracked."""

    def to_yaml(self) -> str:
        """Return the whole spec."""


def open_parent(
    spec: ParentSpec, kind: str, parameters: Mapping[str, Any], resume: RunFolder | None
) -> RunFolder:
    """Enter a run in MLflow and make its folder, or set one that was interrupted back to running.

    Args:
        spec: The sweep or study.
        kind: Which of them it is.
        parameters: What is told of it.
        resume: The run that was interrupted.

    Raises:
        UserError: The run to go on with is not in the store.
        RunError: The store can't be reached.
    """
    if resume is not None:
        open_run(spec.tracking, resume.run_id)
        return resume
    told = {name: value for name, value in parameters.items() if not name.startswith("tracking.")}
    run_id = create_run(spec.tracking, name=spec.name, parameters=told, tags={"lossworks.kind": kind})
    return RunFolder.create(spec, run_id)


def close_parent(
    spec: ParentSpec,
    folder: RunFolder,
    status: TrackedStatus,
    artifacts: Iterable[Path],
    reason: str,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Send what is left of a run's metrics, its files and tags, and its status.

    Returns:
        What went wrong, in words; empty if nothing did.
    """
    files = [path for path in (folder.spec_file, *artifacts) if path.is_file()]
    everything = {"lossworks.folder": str(folder.path), **(tags or {})}
    try:
        deliver(spec.tracking, folder.run_id, folder.journal)
        finish_run(
            spec.tracking, folder.run_id, status, artifacts=files, tags=everything, reason=reason or None
        )
    except RunError as error:
        return str(error)
    return ""


@contextmanager
def closing(close: Callable[[TrackedStatus, str], None]) -> Iterator[None]:
    """Close a run however a block ends.

    Args:
        close: Called with how it ended, and why if it did not finish.
    """
    status: TrackedStatus = "FAILED"
    reason = "the driver failed"
    try:
        yield
        status, reason = "FINISHED", ""
    except KeyboardInterrupt:
        status, reason = "KILLED", "stopped"
        raise
    except LossworksError as error:
        reason = str(error)
        raise
    finally:
        close(status, reason)
