"""Files that hold secrets: nobody but their owner may read them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from lossworks.home import home_path
from lossworks_jobs.clusters.local_nodes import token_file
from lossworks_jobs.doctor.check import Area, Check

_AREA = Area("files")


def secret_files() -> Iterator[tuple[str, Path]]:
    """Yield the files that may hold a secret of ours: what is in it, and the path."""
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        yield "Ray's token", Path(os.environ["RAY_AUTH_TOKEN_PATH"]).expanduser()
    yield "Ray's token", Path.home() / ".ray/auth_token"
    yield "Ray's token", token_file()
    yield "MLflow's password", Path.home() / ".mlflow/credentials"
    for path in sorted((home_path() / "server").glob("*")):
        yield "MLflow server", path


def secrets(files: Iterator[tuple[str, Path]] | None = None) -> list[Check]:
    """Check each secret's file that exists."""
    files = secret_files() if files is None else files
    found = [private(name, path) for name, path in files if path.is_file()]
    return found or [_AREA.ok("secrets", "no file with a token or password")]


def private(name: str, path: Path) -> Check:
    """Check that others can't read a file, by its own mode or that of its folder."""
    mode, folder = (stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent))
    for group, word in ((stat.S_IRGRP, "its group"), (stat.S_IROTH, "everybody")):
        enter = stat.S_IXGRP if group == stat.S_IRGRP else stat.S_IXOTH
        if mode & group and folder & enter:
            found = f"{path} has mode {mode:03o}: {word} can read it"
            return _AREA.wrong(name, found, f"Run `chmod 600 {path}`, and replace the secret.")
    return _AREA.ok(name, f"{path}, for its owner only")
