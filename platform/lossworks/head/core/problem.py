"""What every implementation of the head is asked: the shapes that pass between interface and kernels.

Shapes in this package: N rows (tokens), D features, V classes. Indices: i a row, k a class, y_i the target.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lossworks.head.core.low_rank import Frozen, beside_frozen


@dataclass(frozen=True, eq=False)  # tensors have no equality that gives one bool
class LinearProblem:
    """Rows, a classifier, and how a logit is made of them.

    z_ik = C_k·e_i + b_k, then softcap·tanh(z_ik/softcap) if there is a softcap, then z_i,y_i += offset_i.

    Attributes:
        e: E, shape (N, D), floating point.
        c: C, shape (V, D), of the same dtype.
        targets: y, shape (N,), int64 in [0, V), or −1 where no class of this C is the row's target.
        bias: b, shape (V,), or None.
        softcap: Cap of the logits' magnitude, or None.
        target_offset: Shape (N,), added to the target's logit after the softcap, or None.
        probabilities: Soft targets Q, shape (N, V), that stand in for ``targets`` (then all −1), or None.
        frozen: The first columns of the classifier, (V, D − r), that have no gradient, or None. Then ``c`` is
            its last r columns, (V, r), and its gradient theirs.
    """

    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    target_offset: Tensor | None = None
    probabilities: Tensor | None = None
    frozen: Frozen | None = None

    def classes(self, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Return some classes' rows of the whole classifier, (B, D) or (…, D), in a dtype."""
        return beside_frozen(self.c[index].to(dtype), self.frozen, index)

    @property
    def own_e(self) -> Tensor:
        """The columns of E that meet those of C, shape (N, D) or (N, r)."""
        return self.e[:, self.e.shape[1] - self.c.shape[1] :]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums and results: float32 at least."""
        return torch.promote_types(self.e.dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Softmax:
    """The softmax of a row, p_ik = exp(z_ik/τ_i) / Σ_j exp(z_ij/τ_i) over the classes that take part.

    Attributes:
        temperature: τ > 0, one number or one per row, shape (N,).
        classes: Which classes take part, bool, shape (V,); all of them if None.
    """

    temperature: float | Tensor = 1.0
    classes: Tensor | None = None


class RowSums(NamedTuple):
    """What a pass over the logits leaves of each row; every tensor (N,), float32 at least but ``predicted``.

    Attributes:
        logsumexp: log Σ_k exp(z_ik/τ_i), *not* multiplied by τ.
        target: z_i,y_i with its offset, without τ; 0 where the target is −1; Σ_k q_ik z_ik of soft targets.
        expected: Σ_k p_ik z_ik, or None if it was not asked for.
        total: Σ_k z_ik over all classes, or None.
        squares: Σ_k z_ik² over all classes, or None.
        maximum: A number m_i near the largest z_ik/τ_i, for differences without cancellation, or None.
        log_total: log Σ_k exp(z_ik/τ_i − m_i), so that logsumexp is m + log_total, or None.
        largest: max_k z_ik over all classes, without τ, or None if it was not asked for.
        predicted: The class of the largest logit, int64, or None.
        divergence: Of the row's softmax from a teacher's, or None.
    """

    logsumexp: Tensor
    target: Tensor
    expected: Tensor | None = None
    total: Tensor | None = None
    squares: Tensor | None = None
    maximum: Tensor | None = None
    log_total: Tensor | None = None
    largest: Tensor | None = None
    predicted: Tensor | None = None
    divergence: Tensor | None = None

    def part(self, rows: slice) -> "RowSums":
        """Return the sums of some rows."""
        lse, target, *others = self
        rest = (None if column is None else column[rows] for column in others)
        return RowSums(lse[rows], target[rows], *rest)

    def shifted(self) -> tuple[Tensor, Tensor]:
        """Return m and log_total, both of shape (N,); logsumexp and 0 if they are not known apart."""
        if self.maximum is None or self.log_total is None:
            return self.logsumexp, torch.zeros_like(self.logsumexp)
        return self.maximum, self.log_total


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The gradient of a loss with respect to the logits, one number per row and part.

    ∂L/∂z_ik = softmax_i·p_ik + expected_i·p_ik·(1 + (z_ik − E_i)/τ_i) + target_i·[k = y_i]
             + constant_i·w_k + linear_i·z_ik + divergence_i·∂D_i/∂z_ik,

    with E_i = Σ_k p_ik z_ik; where there is a softcap it is multiplied by 1 − (z_ik/softcap)² of the capped
    logit *before* the target's offset. Each is of shape (N,), float32 at least, or None for 0.

    Attributes:
        softmax: Of p_ik, which is also ∂(τ·logsumexp)/∂z_ik.
        target: Of the target's class.
        expected: Of ∂E_i/∂z_ik.
        constant: Of every class.
        linear: Of z_ik.
        constant_weights: w, shape (V,); 1 if None.
        divergence: Of the gradient of the divergence D_i from a teacher's softmax.

    For soft targets ``[k = y_i]`` is q_ik.
    """

    softmax: Tensor | None = None
    target: Tensor | None = None
    expected: Tensor | None = None
    constant: Tensor | None = None
    linear: Tensor | None = None
    constant_weights: Tensor | None = None
    divergence: Tensor | None = None

    def part(self, rows: slice) -> "Coefficients":
        """Return the coefficients of some rows."""
        columns = (self.softmax, self.target, self.expected, self.constant, self.linear)
        softmax, target, expected, constant, linear = (None if c is None else c[rows] for c in columns)
        divergence = None if self.divergence is None else self.divergence[rows]
        return Coefficients(softmax, target, expected, constant, linear, self.constant_weights, divergence)


Wanted = tuple[bool, bool, bool]
"""Whether the gradients of E, C and the bias are wanted."""


class Gradients(NamedTuple):
    """The gradients of E (N, D), C (V, D) and the bias (V,); None where not asked for."""

    e: Tensor | None
    c: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Filter:
    """Which probabilities are left out of the two gradient products, and what stands in for them.

    Entries with |p_ik − [k = y_i]| < eps may be left out. With ``repair`` their sum over rows and over
    classes is kept by a rank-one matrix (see :mod:`lossworks.head.core.filtering`); without, they are lost,
    as in Wijmans et al. (ICLR 2025), section 4.3.
    """

    eps: float
    repair: bool = True
