"""Where the runs go: the address of the MLflow store, and whether it can be used."""

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from lossworks.errors import UserError
from lossworks.home import home
from lossworks.specs.parts import TrackingSpec
from lossworks.tracking.quiet import quiet_mlflow

_SQLITE = "sqlite:///"
_ALLOWED = "use http(s)://HOST:PORT or sqlite:////ABSOLUTE/PATH"
_CHECK_TIMEOUT_S = 4


def tracking_uri(spec: TrackingSpec) -> str:
    """Return the address of the MLflow store: ``spec.uri``, or the embedded database in the home folder."""
    if spec.uri is None:
        return f"{_SQLITE}{home() / 'mlflow.db'}"
    return spec.uri.rstrip("/") if spec.uri.startswith("http") else spec.uri


def database_path(uri: str) -> Path | None:
    """Return the file behind a ``sqlite:///`` address, or None for a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def redact(text: str) -> str:
    """Return a text with ``user:password@`` in every address replaced by ``***@``."""
    return re.sub(r"(?<=://)[^\s/]*@", "***@", text)


def check_tracking(spec: TrackingSpec) -> None:
    """Check, in about five seconds at most, that runs can be written to the store.

    Raises:
        UserError: The address is of an unknown kind, the server does not answer, or the database's folder
            can't be written.
    """
    uri = tracking_uri(spec)
    shown = redact(uri)
    scheme = uri.partition(":")[0].lower()
    if scheme in ("http", "https"):
        _check_server(uri, shown)
    elif scheme == "sqlite":
        _check_database(uri, shown)
    elif scheme == "file" or "://" not in uri:
        raise UserError(f"tracking.uri={shown}: MLflow no longer writes to plain folders; {_ALLOWED}")
    else:
        raise UserError(f"tracking.uri={shown}: {scheme} is not supported; {_ALLOWED}")


def _check_server(uri: str, shown: str) -> None:
    if not _names_host(uri):
        raise UserError(f"tracking.uri={shown}: names no host; {_ALLOWED}")
    status = _health(uri)
    if status is None:
        raise UserError(f"tracking.uri={shown}: no answer from the server; is it running and reachable?")
    if status in (401, 403):
        raise UserError(
            f"tracking.uri={shown}: the server refuses access (HTTP {status}); check user and password"
        )
    if status != 200:
        raise UserError(f"tracking.uri={shown}: answers HTTP {status} to /health; is it an MLflow server?")


def _names_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, an unclosed bracket
        return False


def _health(uri: str) -> int | None:
    """Return the status of a server's health page, or None when there is no answer.

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
            "/health",
            "GET",
            max_retries=0,
            timeout=_CHECK_TIMEOUT_S,
            raise_on_status=False,
        )
    except (MlflowException, OSError):
        return None
    return int(answer.status_code)


def _check_database(uri: str, shown: str) -> None:
    path = database_path(uri)
    if path is None or not path.is_absolute():
        raise UserError(f"tracking.uri={shown}: the path must be absolute: sqlite:////ABSOLUTE/PATH")
    if path.is_dir():
        raise UserError(f"tracking.uri={shown}: is a folder; name the database file in it")
    if path.exists():
        _check_file(path, shown)
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"tracking.uri={shown}: {folder} can't be written")


def _check_file(path: Path, shown: str) -> None:
    if not os.access(path, os.R_OK | os.W_OK):
        raise UserError(f"tracking.uri={shown}: the file can't be read and written")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"tracking.uri={shown}: is no usable SQLite database: {error}") from None
