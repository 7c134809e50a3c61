"""The strategies there are: every class with a slug in this package's files."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from lossworks.cli import require_one
from lossworks.errors import UserError
from lossworks.specs import Spec

if TYPE_CHECKING:
    from lossworks_federated.strategies.interface import Federated
    from lossworks_federated.strategies.parts import Part


@cache
def strategies() -> dict[str, type["Federated"]]:
    """Return all strategies by slug, sorted."""
    import lossworks_federated.strategies as package
    from lossworks_federated.strategies.interface import Federated

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    found = {kind.slug: kind for kind in _below(Federated) if kind.slug}
    return dict(sorted(found.items()))


def _below(kind: type[Any]) -> list[type[Any]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _below(child))]


def strategy(name: str) -> type["Federated"]:
    """Return a strategy's class.

    Raises:
        UserError: There is none of that name.
    """
    return strategies()[require_one(name, list(strategies()), "strategy")]


def check_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a strategy's hyperparameters with its defaults filled in.

    Raises:
        UserError: There is no such strategy or hyperparameter, or a value is out of range.
    """
    kind = strategy(name)
    return kind.Settings.parse(given, source=f"strategy {name}").model_dump(mode="json")


def check_also(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an added part with its defaults filled in.

    Raises:
        UserError: There is no such method, it has no client part, or the strategy has it already.
    """
    rest = dict(entry)
    other = rest.pop("name", None)
    able = [slug for slug, kind in strategies().items() if kind.part is not None]
    if other not in able:
        raise UserError(f"strategy {name}: also={other!r}: methods with a client part are {', '.join(able)}")
    if other == name:
        raise UserError(f"strategy {name}: also={other}: is this strategy itself")
    return {"name": other, **check_settings(other, rest)}


def part_of(entry: Mapping[str, Any]) -> "Part":
    """Return the client part that a mapping of ``name`` and hyperparameters describes.

    Raises:
        UserError: It describes none.
    """
    rest = dict(entry)
    name = rest.pop("name", "")
    kind = strategy(name)
    if kind.part is None:
        raise UserError(f"{name}: has no client part")
    settings: Spec = kind.Settings.parse(rest, source=f"strategy {name}")
    return kind.part(settings)
