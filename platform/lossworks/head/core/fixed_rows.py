"""Rows in tiles of one shape, so that what a row gets does not depend on what stands beside it.

Matrix products and sums add up in an order that follows their shapes. Where every tile has the same number of
rows, the last one filled up with rows of zeros, a row's numbers have the same bits alone, in any batch and at
any place.
"""

from dataclasses import replace
from typing import overload

from torch import Tensor

from lossworks.head.core.problem import Coefficients, LinearProblem, RowSums, Softmax


class FixedRows:
    """Fills N rows up to a multiple of a tile's.

    Args:
        rows: N.
        tile: Rows of a tile.

    Attributes:
        given: The rows that are not filling.
    """

    def __init__(self, rows: int, tile: int) -> None:
        self.given = slice(0, rows)
        self._filled = -(-max(rows, 1) // tile) * tile

    @overload
    def column(self, values: Tensor, filling: float = ...) -> Tensor: ...

    @overload
    def column(self, values: Tensor | None, filling: float = ...) -> Tensor | None: ...

    def column(self, values: Tensor | None, filling: float = 0.0) -> Tensor | None:
        """Return a tensor (N, …) with further rows; None for None."""
        if values is None:
            return None
        # A copy, wherever the rows lie in memory: products look at the alignment of their operands.
        filled = values.new_full((self._filled, *values.shape[1:]), filling)
        filled[self.given] = values
        return filled

    def problem(self, problem: LinearProblem) -> LinearProblem:
        """Return a problem with further rows of zeros, which have no target."""
        return replace(
            problem,
            e=self.column(problem.e),
            targets=self.column(problem.targets, -1),
            target_offset=self.column(problem.target_offset),
            probabilities=self.column(problem.probabilities),
        )

    def softmax(self, softmax: Softmax) -> Softmax:
        """Return a softmax with temperatures of further rows."""
        tau = softmax.temperature
        return replace(softmax, temperature=self.column(tau, 1.0) if isinstance(tau, Tensor) else tau)

    def sums(self, sums: RowSums) -> RowSums:
        """Return sums with zeros for further rows."""
        return RowSums(*(self.column(x) for x in sums))  # type: ignore[arg-type]  # the first two always are

    def coefficients(self, parts: Coefficients) -> Coefficients:
        """Return coefficients with zeros for further rows."""
        columns = (parts.softmax, parts.target, parts.expected, parts.constant, parts.linear)
        softmax, target, expected, constant, linear = (self.column(x) for x in columns)
        return Coefficients(softmax, target, expected, constant, linear, parts.constant_weights)
