"""The catalogue of losses: ``create("ldr", temperature=0.7)``, ``search_space("ldr")``.

Declarations are read without torch; the code of an entry is imported when it is created.
"""

from typing import TYPE_CHECKING, Any

from lossworks.catalogue.declaration import Case, Declaration, Hyperparameter, Paper
from lossworks.catalogue.entry import Entry
from lossworks.catalogue.registry import create, declaration, declarations, search_space

if TYPE_CHECKING:
    from lossworks.losses.interface import Context, Loss, RowLoss

__all__ = [
    "Case",
    "Context",
    "Declaration",
    "Entry",
    "Hyperparameter",
    "Loss",
    "Paper",
    "RowLoss",
    "create",
    "declaration",
    "declarations",
    "search_space",
]


def __getattr__(name: str) -> Any:
    """Import the base classes, and torch with them, on first use."""
    if name in ("Context", "Loss", "RowLoss"):
        from lossworks.losses import interface

        return getattr(interface, name)
    raise AttributeError(f"module 'lossworks.losses' has no attribute {name!r}")
