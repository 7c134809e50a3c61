"""Direct coverage optimisation: losses for answers that are drawn N times."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer, switch
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.head import LogSumExp, Target
from lossworks.losses.interface import Context, RowLoss
from lossworks.losses.problems import Problem, of_sequences, steps
from lossworks.losses.rows import LogitRows
from lossworks.models.interface import Outputs

_PAPER = Paper(
    "Rethinking Fine-Tuning when Scaling Test-Time Compute", "Chen, Raventós, Cheng, Ganguli, Druckmann", 2025
)
_SMALL = 1e-3  # N·p below which the series is exact to float64's needs
_NEAR_ONE = -1e-12  # log p above which the answer is certain


def coverage_loss(log_p: Tensor, samples: int) -> Tensor:
    """Return −log(1 − (1−p)^N), the surprise that one of N samples is the answer; float64, any shape.

    Args:
        log_p: log p ≤ 0 of whole answers, any shape.
        samples: N ≥ 1.
    """
    s = log_p.double().clamp(max=0)
    small = samples * s.exp() < _SMALL
    series = -s - math.log(samples) + (samples - 1) * s.exp() / 2
    # Each branch gets numbers that it can take, since a gradient of 0·∞ would be NaN.
    safe = torch.where(small, -1.0, s).clamp(max=_NEAR_ONE)
    wrong = torch.where(safe > -0.7, (-torch.expm1(safe)).log(), torch.log1p(-safe.exp()))
    return torch.where(small, series, -torch.log(-torch.expm1(samples * wrong)))


class DCO(RowLoss):
    """DCO: minus the log of the chance that N samples contain the answer.

    It is cross-entropy of a whole sequence, weighted by a factor that falls from 1 at p ≪ 1/N to 0 at p = 1:
    it stops making sure answers surer. A sequence is the last axis of the targets, or what ``segments``
    names; in a batch of classes (B,) every example is an answer of one token.

    Use it where many answers are drawn and one right one is enough, and a model is trained until it is sure
    of itself. Not where it is still far from that: p ≪ 1/N weighs as in cross-entropy, and in our study of
    small decoders that name functions (answers) cross-entropy covered more after six epochs.
    """

    slug = "dco"
    kind: ClassVar[str] = "sequence"
    formula = "-log(1 - (1-p)^N) with log p = Σ_t log p(y_t)"
    paper = _PAPER
    products = 4.0
    invariances = ("shift",)
    example: ClassVar[str] = "lossworks train jobs/specs/demo.yaml loss={slug}"

    samples: int = integer(
        256,
        "N: samples that will be drawn; 1 is cross-entropy of the sequence",
        ge=1,
        search=(1, 4096),
        log=True,
    )
    length_mean: bool = switch(
        False, "p is the geometric mean over tokens, as in the authors' default code, not the product"
    )

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`."""
        return of_sequences(rows, generator)

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.of`."""
        if batch["targets"].dim() == 1:
            dense = None if outputs.head is not None else outputs.logits[:, None]
            outputs = Outputs(outputs.hidden[:, None], outputs.head, dense=dense)
        return super().of(outputs, _of_answers(batch), **how)

    def elements(self, batch: Batch) -> float:
        """See :meth:`Loss.elements`."""
        return super().elements(_of_answers(batch))

    @property
    def folds(self) -> bool:
        """No: a sequence's weight is known when all its tokens are."""
        return False

    def values(self, rows: LogitRows, context: Context) -> Tensor:
        """See :meth:`RowLoss.values`."""
        target, lse = rows(Target(), LogSumExp())
        log_p = _per_sequence(target - lse, context.segments)
        if self.length_mean:
            tokens = _per_sequence(rows.valid.to(lse.dtype), context.segments)
            log_p = log_p / tokens.clamp(min=1)
        return coverage_loss(log_p, self.samples).to(lse.dtype)

    def valid(self, rows: LogitRows, context: Context) -> Tensor:
        """Return which sequences have a token that counts."""
        return _per_sequence(rows.valid.to(torch.float32), context.segments) > 0

    def counting(self, targets: Tensor, context: Context) -> Tensor:
        """See :meth:`Loss.counting`; a weight belongs to a sequence, or to what ``segments`` names."""
        if context.weight is None or context.segments is None:
            return super().counting(targets, context)
        nothing = context.weight.detach() == 0
        named = int(context.segments.max()) + 1 if context.segments.numel() else 0
        return self._without(targets, nothing[context.segments]) if nothing.shape == (named,) else targets

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of sequences that count."""
        return (targets != self.ignore_index).any(-1).sum()


class StepwiseDCO(DCO):
    """Step-wise DCO: the same for each step of a proof, where a search branches N_eff times at every step.

    ``segments`` names the step of each token; the loss of a proof is the sum over its steps.
    """

    slug = "dco-step"
    formula = "Σ_j -log(1 - (1-p_j)^N) over the steps j"
    requires = ("segments",)

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`; two steps a sequence."""
        plain = super().problem(rows, generator)
        return plain.given(segments=steps(plain.target))

    samples: int = integer(
        8, "N_eff: branches a step; 1 is cross-entropy of the step", ge=1, search=(1, 32), log=True
    )


def _of_answers(batch: Batch) -> Batch:
    """Return a batch with targets (B, T): classes (B,) are answers of one token each."""
    targets = batch["targets"]
    return {**batch, "targets": targets[:, None]} if targets.dim() == 1 else batch


def _per_sequence(tokens: Tensor, segments: Tensor | None) -> Tensor:
    """Return sums over the last axis, or over what ``segments`` names, shape (S,)."""
    if segments is None:
        return tokens.sum(-1)
    count = int(segments.max()) + 1 if segments.numel() else 0
    return tokens.new_zeros(count).index_add(0, segments.reshape(-1), tokens.reshape(-1))


def pass_at(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right: 1 − C(n−c, k)/C(n, k).

    Args:
        samples: n ≥ k drawn samples.
        correct: c of them that are right, 0 ≤ c ≤ n.
        k: How many will be drawn.

    Raises:
        UserError: The numbers don't fit.

    Example:
        >>> pass_at(samples=4, correct=1, k=2)
        0.5
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise UserError(
            f"pass_at: samples={samples}, correct={correct}, k={k} must be n ≥ c ≥ 0 and n ≥ k ≥ 1"
        )
    if samples - correct < k:
        return 1.0
    # One factor a draw: binomial coefficients of large n overflow.
    misses = (1 - k / left for left in range(samples - correct + 1, samples + 1))
    return 1.0 - math.prod(misses)
