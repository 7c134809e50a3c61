"""The catalogue: what there is, by slug, without importing torch.

``catalogue.json`` beside this file is written from the classes by ``python -m lossworks.catalogue.document``;
a test keeps it current. What other packages add is imported once, if there is any.
"""

import json
import logging
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.packages import offered
from lossworks.errors import UserError, nearest, require_one

if TYPE_CHECKING:
    from lossworks.catalogue.entry import Entry

FILE = Path(__file__).with_name("catalogue.json")
SECTIONS = {"losses": "loss", "methods": "method", "analyses": "analysis"}

_logger = logging.getLogger(__name__)


class Catalogue:
    """Some sections of entries: our own, which a file declares, and those of other installed packages.

    Args:
        file: JSON of our own declarations.
        sections: What one entry of each is called, as in ``{"losses": "loss"}``.
    """

    def __init__(self, file: Path, sections: Mapping[str, str]) -> None:
        self._file, self.sections = file, sections

    def declarations(self, section: str | None = None) -> Mapping[str, Declaration]:
        """Return the declarations of a section, or of all, by slug, in the order of the slugs."""
        found = self._all[0]
        return {slug: one for slug, one in found.items() if section in (None, one.section)}

    @property
    def refused(self) -> Mapping[str, str]:
        """Why entries that packages offer can't be used, in one line each, by slug."""
        return self._all[1]

    def declaration(self, slug: str, section: str | None = None) -> Declaration:
        """Return the declaration of an entry.

        Args:
            slug: Its name.
            section: That it must be of; None for any.

        Raises:
            UserError: There is none of that name, and the message names the nearest; or it can't be used.
        """
        if slug in self.refused:
            raise UserError(f"{slug}: can't be used: {self.refused[slug]}")
        known, every = self.declarations(section), self.declarations()
        if slug in known:
            return known[slug]
        what = self.sections[section or next(iter(self.sections))]
        if slug in every:
            raise UserError(f"{slug}: is no {what}; `lossworks {every[slug].section} {slug}` says what it is")
        names = [*known, *self.refused]
        guess = nearest(slug, [*names, *every])  # of all, since another section may have one more alike
        if guess is not None and guess in every and guess not in names:
            raise UserError(
                f"{slug}: no such {what}; did you mean {guess}, one of the {every[guess].section}?"
            )
        return known[require_one(slug, names, what)]

    def entry_class(self, slug: str) -> "type[Entry]":
        """Import and return the class of an entry.

        Raises:
            UserError: There is none of that name.
        """
        module, _, name = self.declaration(slug).module.partition(":")
        found: type[Entry] = getattr(import_module(module), name)
        return found

    @cached_property
    def _all(self) -> tuple[dict[str, Declaration], dict[str, str]]:
        """Return the declarations by slug, and why others were left out."""
        own = [Declaration.from_json(values) for values in json.loads(self._file.read_text(encoding="utf-8"))]
        found: list[Declaration] = own
        refused: dict[str, str] = {}
        for section in self.sections:
            others, failed = offered(section)
            found, refused = found + others, refused | failed
        by_slug: dict[str, list[Declaration]] = {}
        for one in sorted(found, key=lambda one: one.slug):
            by_slug.setdefault(one.slug, []).append(one)
        for slug, several in by_slug.items():
            if len(several) > 1:
                packages = " and ".join(sorted(one.package for one in several))
                refused[slug] = f"{packages} have an entry of this name each; uninstall all but one"
        for slug, reason in refused.items():
            _logger.warning("%s: can't be used: %s", slug, reason)
        return {slug: several[0] for slug, several in by_slug.items() if slug not in refused}, refused


_OURS = Catalogue(FILE, SECTIONS)


def declarations(section: str | None = None) -> Mapping[str, Declaration]:
    """Return the declarations of ``losses``, ``methods`` or ``analyses``, or of all, by slug."""
    return _OURS.declarations(section)


def refused() -> Mapping[str, str]:
    """Return why entries that packages offer can't be used, in one line each, by slug."""
    return _OURS.refused


def declaration(slug: str, section: str | None = None) -> Declaration:
    """Return the declaration of an entry; see :meth:`Catalogue.declaration`.

    Raises:
        UserError: There is none of that name, and the message names the nearest; or it can't be used.
    """
    return _OURS.declaration(slug, section)


def search_space(slug: str) -> dict[str, dict[str, Any]]:
    """Return what a search varies in an entry; see :meth:`Declaration.search_space`.

    Example:
        >>> search_space("log-z")["coefficient"]
        {'type': 'number', 'low': 1e-05, 'high': 0.01, 'log': True, 'default': 0.0001}
    """
    return declaration(slug).search_space()


def entry_class(slug: str) -> "type[Entry]":
    """Import and return the class of an entry."""
    return _OURS.entry_class(slug)


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
        module = import_module(name)
    except ImportError as error:
        raise UserError(f"{path}: can't be imported: {error}") from None
    if not hasattr(module, attribute):
        require_one(attribute, [known for known in vars(module) if known[0] != "_"], f"class in {name}")
    found = getattr(module, attribute)
    if not isinstance(found, type):
        raise UserError(f"{path}: is no class")
    return found
