"""A real PostgreSQL for tests, with a password, as an ordinary user."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lossworks_testing.server import free_port

PASSWORD = "only-for-tests"  # noqa: S105


def binaries() -> Path | None:
    """Return the folder of PostgreSQL's programs, or None where it isn't installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@contextmanager
def postgres() -> Iterator[tuple[str, int]]:
    """Run PostgreSQL in a folder of its own; yields the user's name and the port on loopback.

    It refuses to run as root; then it runs as ``nobody``.
    """
    programs = binaries()
    # Not below tmp_path, which nobody else may enter.
    with tempfile.TemporaryDirectory(prefix="lossworks-postgres-") as name:
        folder, port = Path(name), free_port()
        owner = {"user": "nobody"} if os.geteuid() == 0 else {}
        if owner:
            shutil.chown(folder, "nobody")
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        options = ["-D", str(folder / "data"), "-U", "me", "-A", "scram-sha-256", "--pwfile"]
        # Its output goes to no pipe of ours, which the server would keep open.
        quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **owner}
        make = [programs / "initdb", *options, str(folder / "password")]
        subprocess.run(make, check=True, **quiet)
        control = [programs / "pg_ctl", "-D", str(folder / "data"), "-w", "-l", str(folder / "log")]
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        subprocess.run([*control, "-o", settings, "start"], check=True, **quiet)
        try:
            yield "me", port
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, **quiet)
