"""This installation of Lossworks as a cluster can take it: the code, its commands and its lock."""

import hashlib
from collections.abc import Iterator
from importlib.metadata import distribution
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from lossworks import __version__

_PACKAGES = ("lossworks", "lossworks_jobs", "lossworks_tune", "lossworks_federated")


def write_package(folder: Path) -> str:
    """Write what runs here into a folder as a wheel unpacks there, and return its version.

    Not as a wheel's file: Ray 2.55 installs one with all that it depends on, torch included, and when two
    workers come to a fresh node at once, the second installation removes what the first has made. The
    version ends in a digest of the code. Dependencies are the nodes' own, and are compared with the lock,
    which is part of the code, on arrival (:mod:`lossworks_jobs.submission.lock`).
    """
    digest = hashlib.sha256()
    for name, source in sorted(_files()):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        content = source.read_bytes()
        target.write_bytes(content)
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    version = f"{__version__}+{digest.hexdigest()[:12]}"
    info = folder / f"lossworks-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lossworks\nVersion: {version}\n")
    # The commands, and what sweeps can train, are found through it.
    (info / "entry_points.txt").write_text(distribution("lossworks").read_text("entry_points.txt") or "")
    return version


def _files() -> Iterator[tuple[str, Path]]:
    """Yield the files of all rooms that are installed, by their place; the library's has the lock."""
    for package in _PACKAGES:
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            root = Path(folder)
            for path in root.rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts:
                    yield f"{package}/{path.relative_to(root).as_posix()}", path


def lock_file() -> Path:
    """Return the exact versions that this installation was tested with."""
    return Path(str(files("lossworks") / "requirements.lock"))
