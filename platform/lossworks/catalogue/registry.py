"""The catalogue: what there is, by slug, without importing torch.

``catalogue.json`` beside this file is written from the classes by ``python -m lossworks.catalogue.document``;
a test keeps it current.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.catalogue.declaration import Declaration
from lossworks.cli import require_one
from lossworks.errors import UserError

if TYPE_CHECKING:
    from lossworks.losses.interface import Entry

FILE = Path(__file__).with_name("catalogue.json")


@cache
def declarations() -> Mapping[str, Declaration]:
    """Return every entry's declaration by slug, in the order of the slugs."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    return {entry["slug"]: Declaration.from_json(entry) for entry in entries}


def declaration(slug: str) -> Declaration:
    """Return the declaration of an entry.

    Raises:
        UserError: There is none of that name; the message names the nearest.
    """
    return declarations()[require_one(slug, list(declarations()), "loss")]


def search_space(slug: str) -> dict[str, dict[str, Any]]:
    """Return what a search varies in an entry; see :meth:`Declaration.search_space`.

    Example:
        >>> search_space("log-z")["coefficient"]
        {'type': 'number', 'low': 1e-05, 'high': 0.01, 'log': True, 'default': 0.0001}
    """
    return declaration(slug).search_space()


def entry_class(slug: str) -> "type[Entry]":
    """Import and return the class of an entry."""
    module, _, name = declaration(slug).module.partition(":")
    found: type[Entry] = getattr(import_module(module), name)
    return found


def create(slug: str, **options: Any) -> Any:
    """Return the loss, method or analysis of that name.

    Args:
        slug: Its name in the catalogue.
        options: Its hyperparameters, and ``reduction`` and ``ignore_index`` of losses.

    Raises:
        UserError: Something has a wrong name, or a value out of its range.

    Example:
        >>> create("ldr", temperature=0.7)
        LDR(temperature=0.7, margin=0.1, normalisation='none')
    """
    return entry_class(slug)(**options)


def installed_class(path: str) -> type:
    """Return the loss class that ``module:attribute`` of an installed package names.

    Raises:
        UserError: There is no such module or attribute, or it is no loss.
    """
    name, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{path}: can't be imported: {error}") from None
    if not isinstance(found, type):
        raise UserError(f"{path}: is no class")
    return found
