"""What losses that make a model forget share: nats of the answers to be forgotten and of those to stay.

Shapes: B rows, C ≥ 2 candidates, of which the first is to be forgotten and the second to stay, L tokens, V
classes. A row may lack a candidate: all of its targets are ignored.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.errors import UserError
from lossworks.head.core.arguments import Implementation
from lossworks.head.core.valid_rows import check_range
from lossworks.losses.interface import Addition, Loss
from lossworks.losses.problems import Problem, of_candidates
from lossworks.losses.rows import answer_log_probabilities
from lossworks.models.interface import Outputs

FORGET, RETAIN = 0, 1
"""Candidates: what is to be forgotten, and what is to stay."""


class UnlearningLoss(Loss):
    """A function of sums over all tokens of a batch, so that parts of a batch give what the whole gives.

    A subclass says which sums by :meth:`token_sums` and what follows from them by :meth:`of_sums`.
    """

    kind: ClassVar[str] = "unlearning"
    adds: ClassVar[Addition] = "statistics"
    flags = ("whole-batch",)
    example: ClassVar[str] = "lossworks train jobs/specs/unlearn.yaml start=RUN loss={slug}"
    without_logits = True
    products = 4.0
    invariances = ("shift",)
    candidates: ClassVar[int] = 2

    @abstractmethod
    def token_sums(self, outputs: Outputs, targets: Tensor, batch: Batch, impl: Implementation) -> Tensor:
        """Return numbers (S,) that add up over tokens.

        Args:
            outputs: Features (B, C, L, D) with a head, or logits (B, C, L, V).
            targets: (B, C, L) int64; those that are -100 count for nothing.
            batch: What the loss requires besides.
            impl: As for :func:`lossworks.linear_cross_entropy`.
        """

    @abstractmethod
    def of_sums(self, sums: Tensor) -> Tensor:
        """Return the loss of sums (S,) over a whole batch, a scalar."""

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`: logits (rows, C, 3, 7)."""
        return of_candidates(rows, self.candidates, generator)

    def valid_rows(self, targets: Tensor) -> Tensor:
        """Return which rows have a token that counts, bool (B,)."""
        return (targets != self.ignore_index).flatten(1).any(1)

    def sums(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.sums`."""
        context = self.context({**self.given(batch)})
        targets = self.counting(batch["targets"], context)
        self._check(outputs, targets)
        with torch.autocast(outputs.hidden.device.type, enabled=False):
            return self.token_sums(outputs, targets, batch, how.get("impl", "auto"))

    def value(self, sums: Tensor, count: float) -> Tensor:
        """See :meth:`Loss.value`."""
        return self.of_sums(sums) if count else 0.0 * sums.sum()

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.of`."""
        value = self.value(self.sums(outputs, batch, **how), self.elements(batch))
        return value.reshape(1) if self.reduction == "none" else value

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of dense logits.

        Args:
            logits: (B, C, L, V), floating point; half precision is read in float32.
            targets: Classes or ``ignore_index``, int64, (B, C, L).
            given: Fields of :class:`lossworks.losses.Context`.

        Returns:
            A scalar, or (1,) for ``reduction="none"``, since the loss is of a whole batch.

        Raises:
            UserError: The shapes don't fit.
        """
        self.context(given)
        batch = {name: value for name, value in given.items() if value is not None}
        return self.of(Outputs(logits, None, dense=logits), {**batch, "targets": targets})

    def _check(self, outputs: Outputs, targets: Tensor) -> None:
        if (
            targets.dim() != 3
            or targets.shape[1] < self.candidates
            or outputs.hidden.shape[:3] != targets.shape
        ):
            raise UserError(
                f"{self.slug}: rows {tuple(outputs.hidden.shape)} and targets {tuple(targets.shape)} must be "
                f"(B, C, L, …) and (B, C, L) with C of at least {self.candidates}"
            )
        head = outputs.head
        classes = outputs.logits.shape[-1] if head is None else len(head.weight)
        check_range(targets.reshape(-1), classes=classes, ignore_index=self.ignore_index)


def nats_and_tokens(outputs: Outputs, targets: Tensor, candidate: int, impl: Implementation) -> Tensor:
    """Return the summed nats of one candidate of all rows, and of how many tokens, (2,)."""
    chosen = targets[:, candidate]
    log_p = answer_log_probabilities(outputs.at((slice(None), candidate)), chosen, impl=impl)
    return torch.stack((-log_p.sum(), (chosen != IGNORE_INDEX).sum().to(log_p)))


def mean_of(nats: Tensor, tokens: Tensor) -> Tensor:
    """Return nats a token; 0 where there is no token."""
    return torch.where(tokens > 0, nats / tokens.clamp(min=1), 0.0 * nats)
