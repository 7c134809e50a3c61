"""What a job takes along: the resolved spec and the local files that it names, in one folder."""

import argparse
import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from lossworks.cli import Command
from lossworks.errors import UserError
from lossworks.specs.base import command_of, read_yaml
from lossworks.specs.files import NamedFile, named_files, with_paths

UPLOADED = "upload://"
SPEC_FILE = "spec.yaml"
FILES = "files"


@dataclass(frozen=True)
class Bundle:
    """A job ready to be sent.

    Attributes:
        command: The command of the command line that runs it: train, tune, federate or study.
        name: The spec's name.
        values: The whole resolved spec; paths of uploaded files begin with ``upload://``.
        uploads: Local files by the path below ``files/`` that they get.
    """

    command: str
    name: str
    values: dict[str, Any]
    uploads: dict[str, Path]

    @property
    def size(self) -> int:
        """Return the bytes of all uploads."""
        return sum(path.stat().st_size for path in self.uploads.values())

    def write(self, folder: Path) -> None:
        """Write spec and files into an empty folder."""
        (folder / SPEC_FILE).write_text(yaml.safe_dump(self.values, sort_keys=False), encoding="utf-8")
        for name, path in self.uploads.items():
            target = folder / FILES / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def make_bundle(spec: str, overrides: Sequence[str], *, upload: bool, limit: int) -> Bundle:
    """Read and check a spec of any room, and find what it needs from this machine.

    Args:
        spec: YAML file.
        overrides: ``key.path=value`` fields that replace the spec's.
        upload: Take along local files; otherwise all paths are the cluster's.
        limit: Most bytes to take along.

    Raises:
        UserError: The spec is wrong, a file is missing, or there are too many bytes.
    """
    command = command_of(read_yaml(spec))
    values = _resolved(command, spec, overrides)
    paths: dict[tuple[str, ...], str] = {}
    uploads: dict[str, Path] = {}
    for file in named_files(values):
        found = _local(file) if upload else []
        if found:
            place, members = _placed(file, found)
            paths[file.keys] = f"{UPLOADED}{place}"
            uploads |= members
        elif not file.path.is_absolute():
            raise UserError(f"{file}: no such file here; a file of the cluster needs an absolute path")
    bundle = Bundle(command, str(values["name"]), with_paths(values, paths), uploads)
    if bundle.size > limit:
        raise UserError(
            f"{spec} names {bundle.size / 2**20:,.0f} MiB of local files, above --upload-limit "
            f"{limit / 2**20:.2g}: put them where all nodes read them and name them there, with --no-upload"
        )
    return bundle


def _resolved(command: str, spec: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the whole spec as its room's command understands it; rooms don't import each other."""
    points = {point.name: point for point in entry_points(group="lossworks.commands")}
    found: Command = points[command].load()
    parser = argparse.ArgumentParser()
    found.configure(parser)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found.run(parser.parse_intermixed_args([spec, *overrides, "--print-spec"]))
    values: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return values


def _local(file: NamedFile) -> list[Path]:
    """Return the files here that a path stands for; none if it is not here."""
    pattern = str(file.path)
    names = glob(pattern, recursive=True) if has_magic(pattern) else [pattern]  # noqa: PTH207  (may be absolute)
    paths = [Path(name) for name in names]
    found = [path for start in paths for path in ([start] if start.is_file() else sorted(start.rglob("*")))]
    return [path for path in found if path.is_file()]


def _placed(file: NamedFile, found: list[Path]) -> tuple[str, dict[str, Path]]:
    """Return the path below ``files/`` that replaces the spec's, and the files it stands for."""
    digest = hashlib.sha256()
    root = file.path if file.path.is_dir() else None
    members = dict(_named(found, root))
    for name, path in members.items():
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    folder = digest.hexdigest()[:16]
    place = f"{folder}/{found[0].name}" if found == [file.path] else folder
    return place, {f"{folder}/{name}": path for name, path in members.items()}


def _named(found: list[Path], root: Path | None) -> Iterator[tuple[str, Path]]:
    for index, path in enumerate(found):
        if root is not None:
            yield path.relative_to(root).as_posix(), path
        elif len(found) == 1:
            yield path.name, path
        else:  # of a glob: names may repeat, their order stays
            yield f"{index:06d}-{path.name}", path
