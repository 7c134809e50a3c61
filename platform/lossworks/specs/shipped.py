"""Specs that come with the installation: ``jobs/specs/demo.yaml`` and others work from any folder."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

_PLACE = re.compile(r"(?P<room>\w+)/specs/(?P<name>[-\w]+\.yaml)")


def spec_file(path: str | Path) -> Path:
    """Return a spec's file: the one that is named, or else the one of that place in the sources.

    A wheel has the folder ``jobs/specs`` of the sources as ``shipped`` in the package ``lossworks_jobs``.

    Args:
        path: As a person names it.

    Returns:
        The file; ``path`` itself if there is none of either kind.
    """
    # One spec names another by the way from its own folder, which leads through folders that are not here.
    place = _PLACE.fullmatch(os.path.normpath(path))
    if place is None or Path(path).exists():
        return Path(path)
    package = find_spec(f"lossworks_{place['room']}")
    for folder in map(Path, package.submodule_search_locations or () if package else ()):
        for specs in (folder / "shipped", folder.parent / "specs"):
            if (specs / place["name"]).is_file():
                return specs / place["name"]
    return Path(path)
