"""The database behind a team's server: which one, and whether it can be used."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from lossworks.errors import UserError, redact
from lossworks.tracking.address import check_database, database_path
from lossworks.tracking.client import create_database, one_line
from lossworks.tracking.server.accounts import read_private

VARIABLE = "LOSSWORKS_BACKEND_URI"

_ALLOWED = "use sqlite:////ABSOLUTE/PATH or postgresql://[USER@]HOST[:PORT]/DATABASE"
_CONNECT_S = 5


def backend_uri(option: str | None, file: str | None, environment: Mapping[str, str], default: Path) -> str:
    """Return the database's address from where it was given.

    Args:
        option: Of the command line, where a password would be seen by every user of the machine.
        file: Path of a file with the address, which only its owner can read.
        environment: May hold it as ``LOSSWORKS_BACKEND_URI``.
        default: The database file if none is given.

    Raises:
        UserError: It was given twice, holds a password on the command line, or the file can't be used.
    """
    if option is not None and file is not None:
        raise UserError("--backend and --backend-file: give one of them")
    if option is not None:
        if _has_password(option):
            raise UserError(
                "--backend: holds a password, which other users of this machine could read; leave it to "
                f"PGPASSWORD or ~/.pgpass, or put the address into --backend-file FILE or {VARIABLE}"
            )
        return option
    if file is not None:
        return read_private(Path(file).expanduser(), f"--backend-file {file}")
    return environment.get(VARIABLE) or f"sqlite:///{default}"


def prepare_backend(uri: str) -> str:
    """Check that a server can use a database, and return its address with the driver named.

    An SQLite file is made if there is none.

    Raises:
        UserError: It can't.
    """
    named = f"backend {redact(uri.partition('?')[0])}"  # parameters may hold a password
    scheme = uri.partition(":")[0]
    if scheme == "sqlite":
        check_database(uri, named)
        _make_database(uri)
        return uri
    if scheme.partition("+")[0] != "postgresql":
        raise UserError(f"{named}: {scheme} is not supported; {_ALLOWED}")
    # Versions of SQLAlchemy differ in the driver they take for the bare name.
    uri = uri.replace("postgresql://", "postgresql+psycopg://", 1)
    _check_postgresql(uri, named)
    return uri


def _has_password(uri: str) -> bool:
    """Return whether an address holds a password, between user and host or among the parameters."""
    parts = urlsplit(uri)
    return ":" in parts.netloc.rpartition("@")[0] or "password=" in parts.query.lower()


def _make_database(uri: str) -> None:
    path = database_path(uri)
    if path is not None and not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Artifacts go through the server, so that its users need no access to its folders.
        create_database(path, "mlflow-artifacts:/")


def _check_postgresql(uri: str, named: str) -> None:
    import sqlalchemy
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": _CONNECT_S})
    except ImportError:
        raise UserError(f"{named}: needs its driver; `pip install 'lossworks[postgres]'`") from None
    except (ArgumentError, ValueError):
        raise UserError(f"{named}: is no address; {_ALLOWED}") from None
    try:
        engine.connect().close()
    except SQLAlchemyError as error:
        reason = one_line(getattr(error, "orig", None) or error)
        raise UserError(f"{named}: can't be connected to: {reason}") from None
    finally:
        engine.dispose()
