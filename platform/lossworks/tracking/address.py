"""Where the runs go: the address of the MLflow store, and whether it can be used."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from lossworks.errors import UserError, redact
from lossworks.home import home
from lossworks.specs.tracking import TrackingSpec
from lossworks.tracking.quiet import quiet_mlflow

_SQLITE = "sqlite:///"
_ALLOWED = "use http(s)://HOST:PORT or sqlite:////ABSOLUTE/PATH"
_CHECK_TIMEOUT_S = 4
_REFUSED = (401, 403)
_EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"


def tracking_uri(spec: TrackingSpec) -> str:
    """Return the address of the MLflow store: ``spec.uri``, or the embedded database in the home folder."""
    if spec.uri is None:
        return f"{_SQLITE}{home() / 'mlflow.db'}"
    return spec.uri.rstrip("/") if spec.uri.startswith("http") else spec.uri


def database_path(uri: str) -> Path | None:
    """Return the file behind a ``sqlite:///`` address, or None for a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def check_tracking(spec: TrackingSpec) -> None:
    """Check, in about five seconds at most, that runs can be written to the store.

    Raises:
        UserError: The address is of an unknown kind, the server does not answer or refuses the user, or the
            database's folder can't be written.
    """
    uri = tracking_uri(spec)
    named = f"tracking.uri={redact(uri)}"
    scheme = uri.partition(":")[0].lower()
    if scheme in ("http", "https"):
        _check_server(uri, named)
    elif scheme == "sqlite":
        check_database(uri, named)
    elif scheme == "file" or "://" not in uri:
        raise UserError(f"{named}: MLflow no longer writes to plain folders; {_ALLOWED}")
    else:
        raise UserError(f"{named}: {scheme} is not supported; {_ALLOWED}")


def _check_server(uri: str, named: str) -> None:
    if not _names_host(uri):
        raise UserError(f"{named}: names no host; {_ALLOWED}")
    status = _status(uri, "/health")
    if status is None:
        raise UserError(f"{named}: no answer from the server; is it running and reachable?")
    if status not in (200, *_REFUSED):
        raise UserError(f"{named}: answers HTTP {status} to /health; is it an MLflow server?")
    # The health page is open to all; whether this user may come in is known behind it.
    if status in _REFUSED or _status(uri, _EXPERIMENTS) in _REFUSED:
        raise UserError(
            f"{named}: the server refuses access; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or write them to ~/.mlflow/credentials"
        )


def _names_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, an unclosed bracket
        return False


def _status(uri: str, page: str) -> int | None:
    """Return the status of a server's page, or None when there is no answer.

    MLflow's own request is used because it takes user, token and certificates from the places that all
    later requests take them from.
    """
    quiet_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(
            get_default_host_creds(uri),
            page,
            "GET",
            max_retries=0,
            timeout=_CHECK_TIMEOUT_S,
            raise_on_status=False,
        )
    except (MlflowException, OSError):
        return None
    return int(answer.status_code)


def check_database(uri: str, named: str) -> None:
    """Check that a ``sqlite:///`` address is one of a usable database, or of one that can be made.

    Args:
        uri: The address.
        named: What errors begin with: the setting and its value.

    Raises:
        UserError: It isn't.
    """
    path = database_path(uri)
    if path is None or not path.is_absolute():
        raise UserError(f"{named}: the path must be absolute: sqlite:////ABSOLUTE/PATH")
    if path.is_dir():
        raise UserError(f"{named}: is a folder; name the database file in it")
    if path.exists():
        _check_file(path, named)
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{named}: {folder} can't be written")


def _check_file(path: Path, named: str) -> None:
    if not os.access(path, os.R_OK | os.W_OK):
        raise UserError(f"{named}: the file can't be read and written")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{named}: is no usable SQLite database: {error}") from None
