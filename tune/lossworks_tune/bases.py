"""The base of sweeps and studies: a spec of what is trained, around which fields vary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossworks.errors import UserError, nearest
from lossworks.specs.base import read_yaml, suggest_kind
from lossworks.trainables import Direction


def read_base(base: Any, folder: Path) -> Any:
    """Return a sweep's or study's base with the file that it names, if any, read.

    Args:
        base: Values of a training spec, the path of one, or ``spec: PATH`` with what differs from it.
        folder: Where relative paths are taken from.

    Raises:
        UserError: The file is missing or is no YAML mapping.
    """
    if isinstance(base, str):
        return _read_file(folder / base)
    if isinstance(base, dict) and "spec" in base:
        own = {name: value for name, value in base.items() if name != "spec"}
        return merged(_read_file(folder / str(base["spec"])), own)
    return base


def _read_file(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    suggest_kind(values, path)
    return values


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with another's values over it, group by group."""
    found = dict(under)
    for name, value in over.items():
        below = found.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            found[name] = merged(below, value)
        else:
            found[name] = value
    return found


def require_yardstick(name: str, known: Mapping[str, Direction], field: str) -> Direction:
    """Return the better direction of a yardstick.

    Raises:
        UserError: There is none of that name; the message names the field, and the nearest or all of them.
    """
    if name in known:
        return known[name]
    guess = nearest(name, known)
    hint = f"did you mean {guess}?" if guess else f"there are {', '.join(known)}"
    raise UserError(f"{field}={name}: is no yardstick of what is trained; {hint}")
