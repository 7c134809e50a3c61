r"""Leaving small probabilities out of the gradient's products, and the rank-one matrix that replaces them.

Let R be the part of :math:`a_i p_{ik}` that is left out, with :math:`a_i \ge 0`, its row sums
:math:`m_i = \sum_k R_{ik}`, its column sums :math:`q_k = \sum_i R_{ik}` and :math:`M = \sum_i m_i`. Wijmans
et al. (*Cut Your Losses in Large-Vocabulary Language Models*, ICLR 2025, section 4.3) lose it: ∂E misses
:math:`\sum_k R_{ik} C_k`, which is up to :math:`m_i \max_k \|C_k\|`, and all of it points the same way. Here

.. math:: \hat R_{ik} = m_i q_k / M

is put in its place. It keeps every row sum and every column sum, and costs no matrix product:
:math:`∂e_i \mathrel{+}= m_i \bar c` with :math:`\bar c = \sum_k q_k C_k / M`, and
:math:`∂C_k \mathrel{+}= q_k \bar e` with :math:`\bar e = \sum_i m_i e_i / M`. What is left is

.. math:: \|\mathrm{error\ of\ } ∂e_i\| = \Bigl\| \sum_k R_{ik} (C_k - \bar c) \Bigr\|
          \le m_i \max_{k\ \mathrm{left\ out}} \|C_k - \bar c\|, \qquad
          \|\mathrm{error\ of\ } ∂C_k\| \le q_k \max_i \|e_i - \bar e\|,

because :math:`\sum_k \hat R_{ik} (C_k - \bar c) = m_i (\bar c - \bar c) = 0`: the norms of the published
bound are replaced by distances from the mean, and the error is zero if all rows share one distribution, as
at the start of training. Where coefficients have both signs, :math:`|a_i|` weighs the sums q, :math:`m_i`
keeps the sign of its row, and the row sums stay exact.
"""

import torch
from torch import Tensor

from lossworks.head.core.problem import Gradients, LinearProblem

# Rows of a matrix that are made wide at once.
_WIDE_ROWS = 4096


class Remainder:
    """The row and column sums of what the products leave out.

    Args:
        rows: N.
        classes: V.
        like: A tensor of the sums' dtype and device.

    Attributes:
        mass: The probability that was left out of each row, shape (N,).
    """

    def __init__(self, rows: int, classes: int, like: Tensor) -> None:
        self.mass = like.new_zeros(rows)
        self._m = like.new_zeros(rows)
        self._q = like.new_zeros(classes)

    def drop(self, p: Tensor, kept: Tensor, kept_p: Tensor, block: slice, rows: slice, a: Tensor) -> None:
        """Take in a tile of probabilities of which some go into the products.

        Args:
            p: The tile, shape (B, T).
            kept: Which classes of the tile are not left out, shape (K,).
            kept_p: Their probabilities, shape (K, T).
            block: The tile's classes.
            rows: The tile's rows.
            a: The rows' coefficients of p, shape (T,).
        """
        mass = (p.sum(0) - kept_p.sum(0)).clamp_(min=0)
        self.mass[rows] += mass
        self._m[rows] += a * mass
        self._q[block] += torch.mv(p, a.abs()).index_fill_(0, kept, 0)

    def add_to(self, gradients: Gradients, problem: LinearProblem) -> None:
        """Add the rank-one matrix's part to the gradients of E (N, D), C (V, D) and the bias."""
        total = self._q.sum()
        add_rank_one(gradients, problem, self._m, self._q * torch.where(total > 0, 1 / total, 0))


def add_rank_one(gradients: Gradients, problem: LinearProblem, rows: Tensor, classes: Tensor) -> None:
    """Add what ∂L/∂z_ik = rows_i·classes_k gives to the gradients; it takes no product of rows by classes.

    Args:
        gradients: Of E, C and the bias; those that are None are left out.
        problem: E and C.
        rows: Shape (N,), float32 or wider.
        classes: Shape (V,), of the same dtype.
    """
    if gradients.e is not None:
        _add_outer(gradients.e, rows, weighted_classes(problem, classes))
    if gradients.c is not None:
        _add_outer(gradients.c, classes, weighted_sum(problem.own_e, rows))
    if gradients.bias is not None:
        gradients.bias.add_(classes * rows.sum())


def weighted_classes(problem: LinearProblem, weights: Tensor) -> Tensor:
    """Return Σ_k w_k C_k of the whole classifier in the weights' dtype, shape (D,)."""
    total = weights.new_zeros(problem.e.shape[1])
    for part in _pieces(len(problem.c)):
        total += weights[part] @ problem.classes(part, weights.dtype)
    return total


def weighted_sum(matrix: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_k w_k M_k in the weights' dtype, shape (D,), of a matrix (V, D) that may be narrower."""
    total = weights.new_zeros(matrix.shape[1])
    for rows in _pieces(len(matrix)):
        total += weights[rows] @ matrix[rows].to(weights.dtype)
    return total


def _add_outer(into: Tensor, column: Tensor, row: Tensor) -> None:
    """Add column_k·row_d to ``into`` (V, D), rounding once if that is narrower."""
    if into.dtype == column.dtype:
        into.addr_(column, row)
        return
    for rows in _pieces(len(into)):
        into[rows] = torch.addr(into[rows].to(column.dtype), column[rows], row).to(into.dtype)


def _pieces(rows: int) -> list[slice]:
    return [slice(start, start + _WIDE_ROWS) for start in range(0, rows, _WIDE_ROWS)]
