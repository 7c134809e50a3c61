"""The strategies there are, by slug, without importing torch or Flower.

``strategies.json`` beside this file and ``docs/strategies.md`` are written from the classes by ``python -m
lossworks_federated.strategies.catalogue``; a test keeps them current. Other packages add strategies through
entry points of the group ``lossworks.strategies``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.registry import Catalogue
from lossworks.errors import RunError, UserError

if TYPE_CHECKING:
    from lossworks_federated.strategies.interface import Federated
    from lossworks_federated.strategies.parts import Part

FILE = Path(__file__).with_name("strategies.json")
CLIENT_PART, AVERAGES, EXCHANGES, PLAIN_SGD = "client-part", "averages", "exchanges", "plain-sgd"
POOLED, WHOLE_UPDATES = "pooled", "whole-updates"
KEEPS, ASYNCHRONOUS, REPORTS = "keeps", "asynchronous", "reports"
"""What a declaration says of a strategy in its flags.

It has a part in clients, which other strategies can add; the next model is w⁰ plus the mean update, weighted
by examples; further arrays than parameters go between clients and server; clients take plain SGD steps; one
client trains on what all of them have; what the server does holds for whole updates only, since it compares
them with each other or keeps a sum of them that clients keep, too; clients keep arrays between rounds;
replies are taken in one by one; clients report more of their training than how many examples they have.
"""
_KNOWN = frozenset(
    (
        *("parts", "task", "federation", "checkpoint-every", "server-round", "epochs", "lr", "seed", "terms"),
        *("learnt", "personalise"),
        *("clipping_norm", "norm_bit"),  # of Flower's mods for privacy, which read them before a client does
    )
)
_ASKED_BY_FLOWER = {"proximal-mu": ("fedprox", "mu")}
"""What Flower's own strategies put into instructions: the method that it asks for, and its hyperparameter."""
_HEAD = """# Strategies of federated learning

Written from the declarations by `python -m lossworks_federated.strategies.catalogue`; `lossworks federate
--strategies NAME` prints the same. In the formulas w⁰ are the parameters that a round starts from, w_i those
that client i returns, g_i = w_i - w⁰ its update, p_i its share of the examples, F_i its loss, and m the
clients that answered, of M in all.

Flags: `client-part`, the part in clients can be added to other strategies (`also: [fedprox]`); `averages`,
the next model is the mean of the clients', weighted by examples; `exchanges`, further arrays go between
clients and server, so that privacy which clips and blurs updates refuses it; `plain-sgd`, clients must take
steps of SGD without momentum; `pooled`, one client trains on what all of them have, which only a simulation
can do; `whole-updates`, the server compares clients' updates with each other or keeps a sum of them that
clients keep, too, so that compressed ones (`updates`) are refused; `keeps`, clients keep arrays from round to
round; `asynchronous`, replies are taken in one by one as they arrive in virtual time; `reports`, clients
report more than how many examples they have.
"""

_catalogue = Catalogue(FILE, {"strategies": "strategy"})


def strategies() -> Mapping[str, Declaration]:
    """Return the declarations of all strategies by slug, in the order of the slugs."""
    return _catalogue.declarations()


def refused() -> Mapping[str, str]:
    """Return why strategies that packages offer can't be used, in one line each, by slug."""
    return _catalogue.refused


def declaration(name: str) -> Declaration:
    """Return what a strategy declares.

    Raises:
        UserError: There is none of that name.
    """
    return _catalogue.declaration(name)


def search_space(name: str) -> dict[str, dict[str, Any]]:
    """Return what a search varies in a strategy; see :meth:`lossworks.losses.Declaration.search_space`.

    Raises:
        UserError: There is none of that name.
    """
    return declaration(name).search_space()


def strategy(name: str) -> type["Federated"]:
    """Import and return a strategy's class.

    Raises:
        UserError: There is none of that name.
    """
    return cast("type[Federated]", _catalogue.entry_class(name))


def check_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a strategy's hyperparameters with its defaults filled in.

    Raises:
        UserError: There is no such strategy or hyperparameter, or a value is out of range.
    """
    return declaration(name).check(given)


def check_also(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an added part with its defaults filled in.

    Raises:
        UserError: There is no such method, it has no client part, or the strategy has it already.
    """
    rest = dict(entry)
    other = rest.pop("name", None)
    able = [slug for slug, one in strategies().items() if CLIENT_PART in one.flags]
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
    return kind.part(check_settings(name, rest))


def parts_told(config: Mapping[str, Any]) -> "list[Part]":
    """Return the client parts that an instruction to one of our own clients asks for.

    Raises:
        RunError: It holds something that no client here knows, and would leave undone.
    """
    unknown = sorted(set(config) - _KNOWN - set(_ASKED_BY_FLOWER))
    if unknown:
        raise RunError(
            f"the instruction holds {unknown[0]}={config[unknown[0]]!r}, which a client of Lossworks "
            f"does not know and would ignore; it knows {', '.join(sorted(_KNOWN | set(_ASKED_BY_FLOWER)))}"
        )
    return parts_in(config)


def parts_in(config: Mapping[str, Any]) -> "list[Part]":
    """Return the client parts that an instruction asks for, of our strategies or of Flower's own."""
    described = json.loads(str(config.get("parts", "[]")))
    names = [entry.get("name") for entry in described]
    for key, (slug, hyperparameter) in _ASKED_BY_FLOWER.items():
        if key in config and slug not in names:
            described.append({"name": slug, hyperparameter: float(config[key])})
    return [part_of(entry) for entry in described]


def page_text(present: Sequence[Declaration]) -> str:
    """Return the content of ``docs/strategies.md``."""
    from lossworks.catalogue.document import section_text

    return f"{_HEAD}\n{section_text('Strategies', present)}\n"


def found() -> list[Declaration]:
    """Import our strategies and return what they declare, by slug."""
    import lossworks_federated.strategies as package
    from lossworks.catalogue import document

    return document.found(package)


def main() -> None:
    """Write the file and the page."""
    from lossworks.catalogue.document import DOCS, catalogue_text

    present = found()
    FILE.write_text(catalogue_text(present), encoding="utf-8")
    if DOCS.is_dir():
        (DOCS / "strategies.md").write_text(page_text(present), encoding="utf-8")
    print(f"{len(present)} strategies")


if __name__ == "__main__":
    main()
