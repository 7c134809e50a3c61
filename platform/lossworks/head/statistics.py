"""What can be asked of rows of logits: each statistic, declared.

z are the logits of N rows and V classes, y the targets, and the means and sums are over the classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lossworks.errors import UserError
from lossworks.head.core.divergences import DivergenceKind, parts, with_rest


@dataclass(frozen=True, eq=False)
class Target:
    """z_i,y_i, with the target's offset; shape (N,)."""


@dataclass(frozen=True, eq=False)
class LogSumExp:
    """τ_i·log Σ_k exp(z_ik/τ_i), shape (N,).

    Attributes:
        temperature: τ > 0, a number or a tensor of shape (N,), differentiable.
        classes: Which classes take part, bool, shape (V,), the same for all rows; None for all.
    """

    temperature: float | Tensor = 1.0
    classes: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Mean:
    """(1/V) Σ_k z_ik, shape (N,). Without a softcap and an offset it takes no pass: O(N·D + V·D)."""


@dataclass(frozen=True, eq=False)
class SumOfSquares:
    """Σ_k z_ik², shape (N,). Without a softcap and an offset it takes no pass: O(V·D² + N·D²)."""


@dataclass(frozen=True, eq=False)
class Variance:
    """(1/V) Σ_k (z_ik − mean_i)², shape (N,): as cheap as the sum of squares, and nothing cancels."""


@dataclass(frozen=True, eq=False)
class ExpectedLogit:
    """Σ_k p_ik z_ik with p = softmax(z/τ), shape (N,); at τ = 1 the entropy is the logsumexp less this.

    Attributes:
        temperature: τ > 0, a number or a tensor of shape (N,), without a gradient.
        classes: As for :class:`LogSumExp`.
    """

    temperature: float | Tensor = 1.0
    classes: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TeacherExpectedLogit:
    """Σ_k q_ik z_ik with q = softmax of a teacher's logits, shape (N,); no gradient for the teacher.

    Attributes:
        e: The teacher's features, shape (..., D'), as many rows as the student's.
        c: The teacher's classifier, shape (V, D').
        bias: Shape (V,), or None.
        softcap: Of the teacher's logits, or None.
        temperature: τ > 0 of the teacher's softmax.
        classes: How many leading classes both have, where one of them is padded; None where they have as
            many.
    """

    e: Tensor
    c: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0
    classes: int | None = None


@dataclass(frozen=True, eq=False)
class Divergence:
    """A divergence of the student's softmax p from a teacher's q at one temperature, shape (N,).

    It has no gradient for the teacher, and is not multiplied by τ².

    Attributes:
        kind: ``forward-kl`` is KL(q‖p), ``reverse-kl`` KL(p‖q), ``jensen-shannon`` with m = β q + (1 − β) p
            β KL(q‖m) + (1 − β) KL(p‖m) (Agarwal et al., *On-Policy Distillation of Language Models*, ICLR
            2024, equation 1), ``total-variation`` half the sum of |p − q|.
        e: The teacher's features, shape (..., D'), as many rows as the student's.
        c: The teacher's classifier, shape (V', D').
        bias: Shape (V',), or None.
        softcap: Of the teacher's logits, or None.
        temperature: τ > 0 of both softmaxes.
        weight: β in (0, 1), of Jensen-Shannon alone.
        classes: How many leading classes both have, where one of them is padded: what lies beyond is in
            neither softmax. None where they have as many.
    """

    kind: DivergenceKind
    e: Tensor
    c: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0
    weight: float = 0.5
    classes: int | None = None


@dataclass(frozen=True, eq=False)
class TopKDivergence:
    """A divergence from stored log-probabilities of a teacher's K best classes, shape (N,).

    All other classes count as one, whose probability is what the K leave (no term of the teacher's own
    distribution over them can be known).

    Attributes:
        kind: As for :class:`Divergence`.
        log_probabilities: log q of the K classes at the same temperature, shape (..., K), at most 1 in sum.
        classes: int64 in [0, V), distinct in a row, shape (..., K).
        temperature: τ > 0 of the student's softmax.
        weight: β in (0, 1), of Jensen-Shannon alone.
    """

    kind: DivergenceKind
    log_probabilities: Tensor
    classes: Tensor
    temperature: float = 1.0
    weight: float = 0.5

    def of(self, log_p: Tensor) -> Tensor:
        """Return the divergence of a student's log-probabilities (N, K) of the K classes, shape (N,).

        Raises:
            UserError: The stored ones are not shaped like the classes.
        """
        stored = self.log_probabilities
        if stored.shape != self.classes.shape:
            raise UserError(
                f"log_probabilities {tuple(stored.shape)} must be {tuple(self.classes.shape)}, as the classes"
            )
        log_q = stored.detach().reshape(log_p.shape).to(log_p.dtype)
        return parts(self.kind, with_rest(log_p), with_rest(log_q), self.weight).sum(1)


@dataclass(frozen=True, eq=False)
class Gathered:
    """z_ik for K classes of each row, shape (N, K), without the target's offset.

    Attributes:
        classes: int64 in [0, V), shape (..., K).
    """

    classes: Tensor = field()


@dataclass(frozen=True, eq=False)
class Predicted:
    """The class of the largest logit, int64, shape (N,), −1 in ignored rows; without a gradient.

    It comes from any pass that is made anyway. Which of equal logits it is, is not defined.
    """


Statistic = (
    Target
    | LogSumExp
    | Mean
    | SumOfSquares
    | Variance
    | ExpectedLogit
    | TeacherExpectedLogit
    | Divergence
    | TopKDivergence
    | Gathered
    | Predicted
)
StatisticName = Literal["target", "logsumexp", "mean", "sum-of-squares", "variance", "expected", "predicted"]
_BY_NAME: dict[str, Statistic] = {
    "target": Target(),
    "logsumexp": LogSumExp(),
    "mean": Mean(),
    "sum-of-squares": SumOfSquares(),
    "variance": Variance(),
    "expected": ExpectedLogit(),
    "predicted": Predicted(),
}


def named(statistics: Sequence[Statistic | StatisticName]) -> list[Statistic]:
    """Return statistics with names replaced by what they stand for.

    Raises:
        UserError: A name stands for none.
    """
    chosen: list[Statistic] = []
    for statistic in statistics:
        if not isinstance(statistic, str):
            chosen.append(statistic)
        elif statistic in _BY_NAME:
            chosen.append(_BY_NAME[statistic])
        else:
            raise UserError(f"statistic {statistic!r} must be one of {', '.join(_BY_NAME)}")
    return chosen
