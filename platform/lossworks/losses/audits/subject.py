"""What is audited, and what a check finds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lossworks.losses.problems import Problem, of_classes

ROWS = 11  # of a problem


@dataclass(frozen=True)
class AuditFinding:
    """One check of an audit.

    Attributes:
        check: What was checked.
        passed: Whether it holds; None if it doesn't apply.
        detail: The figure, or why it doesn't apply.
    """

    check: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Subject:
    """A loss under audit.

    Attributes:
        name: Slug or ``module:attribute``.
        build: Makes the loss anew for a reduction; random ones must begin at the same state.
        flags: As in :class:`lossworks.catalogue.declaration.Declaration`.
        hyperparameters: As given.
    """

    name: str
    build: Callable[[str], Callable[..., Tensor]]
    flags: tuple[str, ...] = ()
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    def problem(self, rows: int = ROWS, seed: int = 0) -> Problem:
        """Return a random problem that fits: of logits and classes, unless the loss makes its own."""
        make = getattr(self.build("sum"), "problem", of_classes)
        found: Problem = make(rows, torch.Generator().manual_seed(seed))
        return found

    @property
    def indivisible(self) -> str | None:
        """Why parts of a batch needn't give what the whole gives, or None if they must."""
        if "whole-batch" in self.flags:
            return "it is declared to look at a whole batch"
        if "random" in self.flags:
            return "it draws random numbers, others for other batches"
        return None

    def value(self, reduction: str, problem: Problem) -> Tensor:
        """Return the loss of a problem."""
        return self.build(reduction)(problem.prediction, problem.target, **problem.context)


def subject_of(name: str, hyperparameters: dict[str, Any]) -> Subject:
    """Return the entry of the catalogue, or the class ``module:attribute`` of an installed package.

    A class of one's own is called with ``reduction=…`` and the hyperparameters. It may say its ``flags``, and
    has a method ``problem`` like :meth:`lossworks.losses.Loss.problem` if it takes other than logits and
    classes.

    Raises:
        UserError: There is no loss of that name.
    """
    from lossworks.catalogue.registry import declaration, entry_class, installed_class

    if ":" in name:
        made = installed_class(name)
        about: Any = made
    else:
        about = declaration(name, "losses")
        about.check(hyperparameters)
        made = entry_class(name)
    return Subject(
        name,
        lambda reduction: made(reduction=reduction, **hyperparameters),
        tuple(getattr(about, "flags", ())),
        hyperparameters,
    )


def judged(worst: float, limit: float, what: str) -> AuditFinding:
    """Return a finding that passes if a figure is within its limit; NaN is not."""
    return AuditFinding("", worst <= limit, f"{what} {worst:.1e}, allowed {limit:.0e}")
