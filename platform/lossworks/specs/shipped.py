"""Specs that come with the installation: ``jobs/specs/demo.yaml``, or ``demo``, works from any folder."""

import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from lossworks.errors import UserError

_PLACE = re.compile(r"(?P<room>\w+)/specs/(?P<name>[-\w]+)\.yaml")
_NAME = re.compile(r"[-\w]+")
_PREFIX = "lossworks_"


def shipped_specs() -> dict[str, Path]:
    """Return the files of the specs that come with the installation, by place: ``jobs/specs/demo.yaml``.

    A wheel has the folder ``jobs/specs`` of the sources as ``shipped`` in the package ``lossworks_jobs``.
    """
    packages = {point.module.partition(".")[0] for point in entry_points(group="lossworks.commands")}
    rooms = sorted(package.removeprefix(_PREFIX) for package in packages if package.startswith(_PREFIX))
    return {f"{room}/specs/{file.name}": file for room in rooms for file in _files(room)}


def spec_file(path: str | Path, suits: Callable[[Path], bool] = lambda _: True) -> Path:
    """Return a spec's file: the one that is named, or else one that comes with the installation.

    Args:
        path: As a person names it: a file, or a place or a name of :func:`shipped_specs`.
        suits: Tells which of several files of one name can be meant.

    Returns:
        The file; ``path`` itself if there is none.

    Raises:
        UserError: Several that come with the installation have that name.
    """
    if Path(path).exists() and not Path(path).is_dir():
        return Path(path)
    # One spec names another by the way from its own folder, which leads through folders that are not here.
    place = os.path.normpath(path)
    if not _PLACE.fullmatch(place) and not _NAME.fullmatch(place):
        return Path(path)
    specs = shipped_specs()
    found = [one for one in specs if one == place or one.endswith(f"/{place}.yaml")]
    if len(found) > 1:
        found = [one for one in found if suits(specs[one])] or found
    if len(found) > 1:
        raise UserError(f"{path}: there are {' and '.join(found)}; name one of them")
    return specs[found[0]] if found else Path(path)


def _files(room: str) -> Iterator[Path]:
    package = find_spec(f"{_PREFIX}{room}")
    for folder in map(Path, package.submodule_search_locations or () if package else ()):
        for specs in (folder / "shipped", folder.parent / "specs"):
            if specs.is_dir():
                yield from sorted(specs.glob("*.yaml"))
                return
