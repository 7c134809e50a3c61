"""What losses on a chosen and a rejected answer share: log-probabilities of whole answers.

Shapes: B pairs, C ≥ 2 candidates, of which the first is chosen and the second rejected, L tokens, V classes.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.head.core.valid_rows import check_range
from lossworks.losses.interface import Context, Loss
from lossworks.losses.problems import CLASSES, Problem, of_candidates
from lossworks.losses.rows import answer_log_probabilities
from lossworks.models.interface import Outputs

REFERENCE = "reference"
"""The role of the model whose log-probabilities an answer's are compared with, and their name in a batch."""


class Answers(NamedTuple):
    """Log-probabilities of answers, by the model that is trained.

    Attributes:
        log_p: s, summed over the tokens of each answer, (B, C).
        tokens: How many, (B, C).
        reference: The same sums by the reference model, (B, C); None where a loss reads none.
    """

    log_p: Tensor
    tokens: Tensor
    reference: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """The mean of s over the tokens, (B, C)."""
        return self.log_p / self.tokens.clamp(min=1)

    @property
    def ratios(self) -> Tensor:
        """By how much s is above that of the reference, (B, C)."""
        if self.reference is None:
            raise ValueError("the loss doesn't say that it requires the reference")
        return self.log_p - self.reference.to(self.log_p)


class PreferenceLoss(Loss):
    """A loss of pairs of answers; a subclass says what it is by :meth:`pairs`.

    Losses that compare with a reference model read ``reference``: log-probabilities of the candidates.
    """

    kind: ClassVar[str] = "preference"
    example: ClassVar[str] = "lossworks train jobs/specs/preferences.yaml start=RUN loss={slug}"
    without_logits = True
    products = 4.0
    invariances = ("shift",)
    reads: ClassVar[int] = 2
    """Candidates that it looks at: the chosen and the rejected one, and perhaps those behind."""

    @abstractmethod
    def pairs(self, answers: Answers) -> Tensor:
        """Return the losses (B,) of pairs."""

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`: logits (rows, C, 3, 7), and a reference where it is required."""
        found = of_candidates(rows, self.reads, generator)
        if REFERENCE not in self.requires:
            return found
        shape = found.target.shape[:2]
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)
        further = {name: torch.zeros(shape) for name in self.requires if name != REFERENCE}
        return found.given(reference=noise - 3 * math.log(CLASSES), **further)

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of pairs that count: those of which both answers have a token that does."""
        return self.valid_rows(targets).sum()

    def valid_rows(self, targets: Tensor) -> Tensor:
        """Return which pairs count, bool (B,)."""
        return (targets[:, :2] != self.ignore_index).any(-1).all(-1)

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.of`; without the logits where there is a head."""
        context = self.context({**self.given(batch)})
        targets = self.counting(batch["targets"], context)[:, : self.reads]
        targets = self._without(targets, ~self.valid_rows(targets))
        with torch.autocast(targets.device.type, enabled=False):
            log_p = answer_log_probabilities(
                outputs.at((slice(None), slice(self.reads))),
                targets,
                ignore_index=self.ignore_index,
                impl=how.get("impl", "auto"),
            )
            return self._finish(log_p, targets, context)

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of dense logits.

        Args:
            logits: (B, C, L, V), floating point; half precision is read in float32.
            targets: Classes or ``ignore_index``, int64, (B, C, L).
            given: Fields of :class:`lossworks.losses.Context`; ``reference`` (B, C) where it is required.

        Returns:
            A scalar, or (B,) for ``reduction="none"``.

        Raises:
            UserError: The shapes don't fit.
        """
        self.context(given)
        self._check(logits, targets)
        batch = {name: value for name, value in given.items() if value is not None}
        return self.of(Outputs(logits, None, dense=logits), {**batch, "targets": targets})

    def _check(self, logits: Tensor, targets: Tensor) -> None:
        if targets.dim() != 3 or targets.shape[1] < self.reads or logits.shape[:-1] != targets.shape:
            raise UserError(
                f"{self.slug}: logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must be "
                f"(B, C, L, V) and (B, C, L) with C of at least {self.reads}"
            )
        check_range(targets.reshape(-1), classes=logits.shape[-1], ignore_index=self.ignore_index)

    def _finish(self, log_p: Tensor, targets: Tensor, context: Context) -> Tensor:
        valid = self.valid_rows(targets)
        reference = context.others.get(REFERENCE)
        if reference is not None:
            if reference.shape[:1] != log_p.shape[:1] or reference.shape[1] < self.reads:
                raise UserError(
                    f"{self.slug}: reference {tuple(reference.shape)} must be {tuple(log_p.shape)}"
                )
            # What stands beside pairs that don't count may be anything.
            reference = torch.where(valid[:, None], reference[:, : self.reads], 0)
        tokens = (targets != self.ignore_index).sum(-1).to(log_p)
        values = self.pairs(Answers(log_p, tokens, reference))
        return self.reduce_elements(values, valid, context)
