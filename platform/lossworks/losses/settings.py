"""Entries that are no losses: hyperparameters with functions."""

from typing import Any

from lossworks.losses.interface import Entry


class Settings(Entry):
    """An entry that is no module: its checked hyperparameters are attributes.

    Args:
        values: The hyperparameters that the class declares.

    Raises:
        UserError: A name is unknown or a value out of range.
    """

    def __init__(self, **values: Any) -> None:
        self.set_hyperparameters(values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
