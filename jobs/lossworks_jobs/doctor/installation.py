"""Python and the installed packages, against the ranges of Lossworks's own metadata."""

import platform
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lossworks_jobs.doctor.check import Area, Check

_AREA = Area("installation")
_NEEDED_BY = {
    "jobs": "`lossworks train` doesn't work",
    "tune": "`lossworks tune` doesn't work",
    "federated": "`lossworks federate` doesn't work",
    "hf": "hf: models and data sets can't be read",
    "bench": "`lossworks bench` can't measure it",
}
# Peers, measured where they are installed; nothing is lacking without them.
_OPTIONAL = {"bench"}

Installed = Callable[[str], str | None]
Requires = Callable[[str], Sequence[str]]


def installed_version(package: str) -> str | None:
    """Return a package's version, or None if it isn't installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements(package: str) -> Sequence[str]:
    """Return what a package's metadata ask for."""
    return metadata.requires(package) or []


@cache
def _parsed(text: str) -> Requirement:
    """Return one of the hundreds of requirements that Ray lists, and that each extra looks through."""
    return Requirement(text)


def python_version(current: str = platform.python_version(), wanted: str | None = None) -> Check:
    """Check Python's version against ``wanted``, by default the range of Lossworks."""
    wanted = metadata.metadata("lossworks")["Requires-Python"] if wanted is None else wanted
    if SpecifierSet(wanted).contains(current, prereleases=True):
        return _AREA.ok("Python", current)
    return _AREA.wrong("Python", f"{current}, not {wanted}", f"Install Lossworks into a Python {wanted}.")


def packages(*, installed: Installed = installed_version, requires: Requires = requirements) -> Check:
    """Check the packages that every command needs."""
    asked = [_parsed(text) for text in requires("lossworks")]
    own = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = [problem for one in own for problem in _unmet(one, installed, requires)]
    if not found:
        return _AREA.ok("packages", f"all {len(own)} in their ranges")
    return _AREA.wrong("packages", "; ".join(found), "Run `pip install -U lossworks` in this environment.")


def extras(*, installed: Installed = installed_version, requires: Requires = requirements) -> list[Check]:
    """Check the packages of each room; one that is missing costs commands, another version is wrong."""
    return [_extra(name, installed, requires) for name in _NEEDED_BY]


def _extra(name: str, installed: Installed, requires: Requires) -> Check:
    asked = _of_extra("lossworks", name, requires)
    there = [one for one in asked if installed(one.name) is not None]
    shown, fix = f"lossworks[{name}]", f"Run `pip install 'lossworks[{name}]'` in this environment."
    if not there and name not in _OPTIONAL:
        return _AREA.warn(shown, f"not installed: {_NEEDED_BY[name]}", fix)
    looked_at = there if name in _OPTIONAL else asked
    found = [problem for one in looked_at for problem in _unmet(one, installed, requires)]
    if found:
        return _AREA.wrong(shown, f"{'; '.join(found)}: {_NEEDED_BY[name]}", fix)
    versions = [f"{one.name} {installed(one.name)}" for one in there]
    absent = [f"{one.name} is not installed" for one in asked if one not in there]
    return _AREA.ok(shown, ", ".join(versions + absent))


def _of_extra(package: str, extra: str, requires: Requires) -> list[Requirement]:
    """Return what an extra adds to a package."""
    asked = [_parsed(text) for text in requires(package)]
    return [
        one
        for one in asked
        if one.marker and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""})
    ]


def _unmet(wanted: Requirement, installed: Installed, requires: Requires) -> Iterator[str]:
    """Yield what is wrong with a requirement, and with those of its extras."""
    there = installed(wanted.name)
    if there is None:
        yield f"{wanted.name} is missing"
        return
    if not wanted.specifier.contains(there, prereleases=True):
        yield f"{wanted.name} is {there}, not {wanted.specifier}"
    for extra in wanted.extras:
        for one in _of_extra(wanted.name, extra, requires):
            if canonicalize_name(one.name) != canonicalize_name(wanted.name):
                yield from _unmet(one, installed, requires)
