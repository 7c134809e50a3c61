"""Whether a server answers at an address, and whether one can listen there."""

import os
import socket
from urllib.parse import urlsplit

from lossworks.errors import UserError

_PATIENCE_S = 5.0
_USUAL = {"http": 80, "https": 443}


def host_and_port(address: str) -> tuple[str, int] | None:
    """Return whom ``SCHEME://HOST:PORT`` or ``HOST:PORT`` names, or None if it names no server."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or _USUAL.get(parts.scheme)
    except ValueError:
        return None
    return (host, port) if host and port else None


def silence(host: str, port: int) -> str:
    """Return why no connection can be made within some seconds; nothing if one can."""
    try:
        socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except OSError as error:
        return str(error)
    return ""


def require_free_port(host: str, port: int, *, named: str) -> int:
    """Return a port that a server can listen on: the one that is asked for, or any that is free for 0.

    Args:
        host: Address of this machine.
        port: The port.
        named: The setting and its value, for the message.

    Raises:
        UserError: It can't.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"{named}: a port is between 1 and 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            # As servers do: a port whose last connections are still being closed is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UserError(f"{named}: can't be listened on: {error.strerror}") from None


def require_answer(address: str | None) -> None:
    """Refuse an address that nothing listens at; Ray itself would try for minutes.

    Args:
        address: As ``--address`` has it; None for ``$RAY_ADDRESS``, if there is one.

    Raises:
        UserError: No connection within some seconds.
    """
    named = address or os.environ.get("RAY_ADDRESS")
    server = host_and_port(named) if named else None  # "auto" and "local" are Ray's own words
    if server is not None and (reason := silence(*server)):
        where = f"--address {address}" if address else f"RAY_ADDRESS={named}"
        raise UserError(f"{where}: no Ray cluster answers there: {reason}")
