"""Runs in an MLflow store: created, opened again, found and finished."""

import contextlib
import getpass
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lossworks.errors import UserError, redact
from lossworks.specs.tracking import TrackingSpec
from lossworks.tracking.address import database_path, tracking_uri
from lossworks.tracking.client import artifact_root, connect, is_missing, store_errors
from lossworks.tracking.machine import machine_tags, source_tags, version_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TrackedStatus = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's limits; longer values are cut here, without its warning. The whole configuration belongs in an
# artifact, which the caller adds.
_PARAMETER_LENGTH = 6000
_TAG_LENGTH = 5000
_BATCH = 100
_REASON = "lossworks.reason"


def create_run(
    spec: TrackingSpec,
    *,
    name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    parent: str | None = None,
) -> str:
    """Create a run and return its id.

    Besides ``tags`` it gets the git commit of the working folder, the versions of the packages and the
    machine. The experiment, and the embedded database, are created on first use.

    Args:
        spec: Where to.
        name: Name of the run; several runs may share it.
        parameters: Logged as text, cut at 6000 characters; they can't be changed later.
        tags: Tags by name; they win over ours.
        parent: Id of the run that this one belongs to, shown below it.

    Raises:
        UserError: The experiment was deleted and not purged.
        RunError: The store can't be reached or refuses.
    """
    client = connect(spec)
    with store_errors(spec):
        experiment = _experiment_id(client, spec)
        all_tags = {**machine_tags(), **version_tags(), **source_tags(), **_mlflow_tags(parent), **tags}
        cut = {key: value[:_TAG_LENGTH] for key, value in all_tags.items()}
        run = client.create_run(experiment, run_name=name, tags=cut)
        _log_parameters(client, run.info.run_id, parameters)
    return str(run.info.run_id)


def open_run(spec: TrackingSpec, run_id: str) -> None:
    """Set an existing run back to RUNNING, to go on with it.

    Raises:
        UserError: There is no such run in this store.
        RunError: The store can't be reached or refuses.
    """
    client = _connect_existing(spec)
    run = _get_run(client, spec, run_id)
    if run is None:
        raise UserError(
            f"run {run_id}: is not in {redact(tracking_uri(spec))}; set tracking.uri to the store that has it"
        )
    with store_errors(spec):
        client.update_run(run_id, status="RUNNING")
        if _REASON in run.data.tags:
            client.delete_tag(run_id, _REASON)  # it told why the last attempt ended


def finish_run(
    spec: TrackingSpec,
    run_id: str,
    status: TrackedStatus,
    *,
    artifacts: Iterable[Path] = (),
    tags: Mapping[str, str] | None = None,
    reason: str | None = None,
) -> None:
    """Store a run's artifacts and tags and set its final status.

    The status is set even when an artifact can't be stored.

    Args:
        spec: Where the run is.
        run_id: Its id.
        status: How it ended.
        artifacts: Files and folders; a folder keeps its name.
        tags: More tags by name.
        reason: Why it failed, stored as the tag ``lossworks.reason``.

    Raises:
        RunError: The store can't be reached or refuses, or an artifact is missing.
    """
    client = connect(spec)
    all_tags = dict(tags or {}) | ({_REASON: reason} if reason else {})
    with store_errors(spec):
        try:
            for path in artifacts:
                _log_artifact(client, run_id, path)
            for key, value in all_tags.items():
                client.set_tag(run_id, key, value[:_TAG_LENGTH])
        finally:
            client.set_terminated(run_id, status)


def add_artifacts(spec: TrackingSpec, run_id: str, paths: Iterable[Path]) -> None:
    """Store further artifacts of a run that has ended.

    Raises:
        RunError: The store can't be reached or refuses.
    """
    client = connect(spec)
    with store_errors(spec):
        for path in paths:
            _log_artifact(client, run_id, path)


def _mlflow_tags(parent: str | None) -> dict[str, str]:
    """Return the tags that MLflow's pages read."""
    tags = {"mlflow.source.name": "lossworks", "mlflow.source.type": "LOCAL"}
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _log_parameters(client: "MlflowClient", run_id: str, parameters: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    items = [Param(key, str(value)[:_PARAMETER_LENGTH]) for key, value in parameters.items()]
    for start in range(0, len(items), _BATCH):
        client.log_batch(run_id, params=items[start : start + _BATCH])


def _experiment_id(client: "MlflowClient", spec: TrackingSpec) -> str:
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(spec.experiment)
    if known is None:
        try:
            return str(client.create_experiment(spec.experiment, artifact_location=_artifacts(spec)))
        except MlflowException:
            # Another driver may have been faster.
            known = client.get_experiment_by_name(spec.experiment)
            if known is None:
                raise
    if known.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment={spec.experiment}: was deleted in {_shown(spec)}; "
            f"use another name or run `mlflow experiments restore --experiment-id {known.experiment_id}`"
        )
    return str(known.experiment_id)


def _artifacts(spec: TrackingSpec) -> str | None:
    """Return where the artifacts of an embedded store go; a server decides itself."""
    database = database_path(tracking_uri(spec))
    return None if database is None else artifact_root(database)


def _log_artifact(client: "MlflowClient", run_id: str, path: Path) -> None:
    if path.is_dir():
        client.log_artifacts(run_id, str(path), artifact_path=path.name)
    else:
        client.log_artifact(run_id, str(path))


def _connect_existing(spec: TrackingSpec) -> "MlflowClient":
    database = database_path(tracking_uri(spec))
    if database is not None and not database.exists():
        raise UserError(f"{_shown(spec)}: holds no runs yet; nothing was trained with this store")
    return connect(spec)


def _get_run(client: "MlflowClient", spec: TrackingSpec, run_id: str) -> "Run | None":
    from mlflow.exceptions import MlflowException

    with store_errors(spec):
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if is_missing(error):
                return None
            raise
    return run if run.info.lifecycle_stage == "active" else None


def _shown(spec: TrackingSpec) -> str:
    return f"experiment {spec.experiment} of {redact(tracking_uri(spec))}"
