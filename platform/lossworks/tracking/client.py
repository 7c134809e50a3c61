"""The connection to an MLflow store."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lossworks.errors import RunError, redact
from lossworks.specs.tracking import TrackingSpec
from lossworks.tracking.address import database_path, tracking_uri
from lossworks.tracking.quiet import quiet_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient

_opening = threading.Lock()


def connect(spec: TrackingSpec) -> "MlflowClient":
    """Return a client of the store; an embedded database is created on first use.

    Several processes may do this at the same moment: MLflow's migrations would break one another, so they
    run under a lock on a file beside the database. MLflow keeps the opened database, so later calls in the
    same process are cheap.

    Raises:
        RunError: The store can't be opened.
    """
    quiet_mlflow()
    from mlflow import MlflowClient

    uri = tracking_uri(spec)
    database = database_path(uri)
    with store_errors(spec):
        if database is None:
            return MlflowClient(tracking_uri=uri)
        with _opening, _file_lock(database.with_name(f"{database.name}.lock")):
            if not database.exists():
                create_database(database, artifact_root(database))
            return MlflowClient(tracking_uri=uri)


def artifact_root(database: Path) -> str:
    """Return the address of the folder that holds the artifacts of an embedded store."""
    return (database.parent / "artifacts").as_uri()


@contextmanager
def store_errors(spec: TrackingSpec) -> Iterator[None]:
    """Turn the errors of MLflow, of the network and of the file system into a ``RunError`` of one line."""
    quiet_mlflow()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise RunError(f"tracking store {redact(tracking_uri(spec))}: {one_line(error)}") from None


def is_missing(error: Exception) -> bool:
    """Return whether an MLflow error says that the run or experiment does not exist."""
    code = getattr(error, "error_code", None)
    return code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def one_line(error: BaseException, *, limit: int = 300) -> str:
    """Return an error's message in one line of at most ``limit`` characters, without passwords."""
    text = " ".join(redact(str(error)).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def create_database(database: Path, artifacts: str) -> None:
    """Make a migrated database under another name, then give it its own.

    The migrations take seconds; stopped in the middle they leave a file that no later run could use.

    Args:
        database: File to make.
        artifacts: Address below which the artifacts of MLflow's default experiment go.
    """
    quiet_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = database.with_name(f"{database.name}.partial")
    for left_over in (partial, partial.with_name(f"{partial.name}-journal")):
        left_over.unlink(missing_ok=True)
    SqlAlchemyStore(f"sqlite:///{partial}", artifacts).engine.dispose()
    partial.replace(database)


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # gives the lock back
