"""`lossworks server`: MLflow for a team, with users, passwords and artifacts through the server."""

import argparse
import ipaddress
import os
from pathlib import Path

from lossworks.cli import Command
from lossworks.errors import UserError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        metavar="URI",
        help="sqlite:////ABSOLUTE/PATH or postgresql://[USER@]HOST[:PORT]/DATABASE, without a password "
        "(default: a file in the home folder)",
    )
    parser.add_argument(
        "--backend-file",
        metavar="FILE",
        help="file of mode 0600 with that address, and a password in it; so can be LOSSWORKS_BACKEND_URI",
    )
    parser.add_argument(
        "--artifacts", metavar="DIR", help="folder of artifacts (default: in the home folder)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument(
        "--port", type=int, default=5000, help="port on this machine, 0 for any that is free (default 5000)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that answer (default 2)")
    parser.add_argument(
        "--allowed-hosts",
        metavar="NAMES",
        help="names under which users reach the server, with commas between (default: localhost and private "
        "addresses)",
    )
    parser.add_argument(
        "--no-auth", action="store_true", help="without users and passwords; on this machine only"
    )


def _run(arguments: argparse.Namespace) -> int:
    from lossworks.home import home
    from lossworks.ports import require_free_port
    from lossworks.tracking.server.database import backend_uri, prepare_backend
    from lossworks.tracking.server.process import backend_environment, serve

    _check(arguments)
    port = require_free_port(
        arguments.host, arguments.port, named=f"--host {arguments.host} --port {arguments.port}"
    )
    folder = home() / "server"
    uri = backend_uri(arguments.backend, arguments.backend_file, os.environ, folder / "mlflow.db")
    options, environment = _authentication(arguments, folder)
    uri = prepare_backend(uri)
    artifacts = _artifacts(arguments, folder)
    options += ["--artifacts-destination", str(artifacts), "--serve-artifacts"]
    options += ["--default-artifact-root", "mlflow-artifacts:/", "--workers", str(arguments.workers)]
    if arguments.allowed_hosts:
        options += ["--allowed-hosts", arguments.allowed_hosts]
    environment |= backend_environment(uri)
    serve(options, host=arguments.host, port=port, environment=environment)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: must be at least 1")
    if arguments.no_auth and not _is_loopback(arguments.host):
        raise UserError(
            f"--no-auth --host {arguments.host}: anyone who reaches the server could change and delete runs; "
            "leave --no-auth out, or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, wherever it leads
        return False


def _authentication(arguments: argparse.Namespace, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return options and variables of the authentication, and say where the administrator's file is."""
    from lossworks.tracking.server.accounts import Accounts
    from lossworks.tracking.server.application import OPEN, WITH_USERS

    if arguments.no_auth:
        return ["--app-name", OPEN], {}
    accounts = Accounts(folder)
    environment = accounts.environment(os.environ)
    if accounts.admin.exists():
        print(f"the administrator's name and password are in {accounts.admin}", flush=True)
    return ["--app-name", WITH_USERS], environment


def _artifacts(arguments: argparse.Namespace, folder: Path) -> Path:
    path = Path(arguments.artifacts).expanduser().absolute() if arguments.artifacts else folder / "artifacts"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--artifacts {path}: can't be made: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--artifacts {path}: can't be written")
    return path


SERVER = Command(
    "run an MLflow server for a team, with users and passwords",
    _configure,
    _run,
    group="machines and servers",
)
