"""This installation of Lossworks as a wheel that a cluster can take: the code, its commands and its lock."""

import base64
import csv
import hashlib
import io
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from lossworks import __version__

_PACKAGES = ("lossworks", "lossworks_jobs", "lossworks_tune", "lossworks_federated")
_WHEEL = "Wheel-Version: 1.0\nGenerator: lossworks\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same code gives the same wheel


def write_wheel(folder: Path) -> Path:
    """Write a wheel of what runs here into a folder and return its path.

    Ray keeps wheels by file name and installs them with all they depend on, which would fetch torch on every
    node. So the version ends in a digest of the contents, and dependencies are not declared: the nodes' own
    must be those of the lock, which travels along and is compared on arrival (:mod:`lossworks_jobs.lock`).
    """
    contents = dict(sorted(_files()))
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    version = f"{__version__}+{digest.hexdigest()[:12]}"
    info = f"lossworks-{version}.dist-info"
    contents |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: lossworks\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": _WHEEL.encode(),
        f"{info}/entry_points.txt": (distribution("lossworks").read_text("entry_points.txt") or "").encode(),
    }
    path = folder / f"lossworks-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in [*contents.items(), (f"{info}/RECORD", _record(contents, info))]:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return path


def _files() -> Iterator[tuple[str, bytes]]:
    """Yield the files of all rooms that are installed; the library's has the lock."""
    for package in _PACKAGES:
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            root = Path(folder)
            for path in root.rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts:
                    yield f"{package}/{path.relative_to(root).as_posix()}", path.read_bytes()


def lock_file() -> Path:
    """Return the exact versions that this installation was tested with."""
    return Path(str(files("lossworks") / "requirements.lock"))


def _record(contents: dict[str, bytes], info: str) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={digest}", len(content)])
    rows.writerow([f"{info}/RECORD", "", ""])
    return text.getvalue().encode()
