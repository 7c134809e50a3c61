"""Entries that other installed packages offer, through entry points of the group ``lossworks.<section>``.

An entry point's name is the entry's slug and its value ``module:Class``.
"""

import re
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.entry import Entry

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def offered(section: str) -> tuple[list[Declaration], dict[str, str]]:
    """Import what packages offer for a section.

    Returns:
        The declarations, and by slug why an entry can't be used.
    """
    found, refused = [], {}
    for point in sorted(entry_points(group=f"lossworks.{section}"), key=lambda point: point.name):
        try:
            found.append(replace(_declared(point, section), package=_package(point)))
        except Exception as error:  # noqa: BLE001 - anybody's code, which is to stop nothing else
            reason = " ".join(str(error).split())
            refused[point.name] = f"{_package(point)}: {point.value}: {type(error).__name__}: {reason}"
    return found, refused


def _declared(point: EntryPoint, section: str) -> Declaration:
    found = point.load()
    if not (isinstance(found, type) and issubclass(found, Entry)):
        raise TypeError("is no class that is derived from lossworks.losses.Entry")
    if getattr(found, "section", None) != section:
        raise ValueError(f"is of the section {getattr(found, 'section', None)!r}, not {section!r}")
    if found.slug != point.name:
        raise ValueError(f"has slug={found.slug!r}, which must be the entry point's name, {point.name!r}")
    if not _SLUG.fullmatch(found.slug):
        raise ValueError(f"slug={found.slug!r} must be in kebab case")
    declared = found.declaration()
    if not declared.title:
        raise ValueError("has no docstring, whose first line is the title")
    return declared


def _package(point: EntryPoint) -> str:
    return "an unnamed package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
