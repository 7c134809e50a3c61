"""Entries that are no losses: training procedures, and analyses of something trained."""

from typing import Any, ClassVar

from lossworks.catalogue.entry import Entry


class _Settings(Entry):
    """Hyperparameters with functions.

    Args:
        values: The hyperparameters that the class declares.

    Raises:
        UserError: A name is unknown or a value out of range.
    """

    def __init__(self, **values: Any) -> None:
        self.set_hyperparameters(values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class Method(_Settings):
    """A training procedure."""

    section: ClassVar[str] = "methods"
    kind: ClassVar[str] = "method"


class Analysis(_Settings):
    """Figures, and pictures, of something trained."""

    section: ClassVar[str] = "analyses"
    kind: ClassVar[str] = "analysis"
