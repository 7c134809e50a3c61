"""The implementations behind ``impl``, each with the functions of :mod:`lossworks.head.cpu.backend`."""

from typing import Protocol

import torch
from torch import Tensor

from lossworks.errors import UserError
from lossworks.head.core.problem import Coefficients, Gradients, LinearProblem, RowSums, Wanted
from lossworks.head.cpu.backend import Combine, FusedResult, Pass, Rule


class Backend(Protocol):
    """What an implementation provides; see :mod:`lossworks.head.cpu.backend` for the arguments."""

    def row_sums(self, problem: LinearProblem, how: Pass) -> RowSums:
        """Return the sums of every row."""

    def gradients(
        self, problem: LinearProblem, how: Pass, sums: RowSums, coefficients: Coefficients, wanted: Wanted
    ) -> tuple[Gradients, Tensor | None]:
        """Return the gradients, and the probability that a filter left out of each row, (N,) or None."""

    def fused(
        self, problem: LinearProblem, how: Pass, rule: Rule, wanted: Wanted, combine: Combine = ...
    ) -> FusedResult:
        """Return losses and gradients together."""

    def teacher_expected(
        self,
        problem: LinearProblem,
        teacher: LinearProblem,
        temperature: float,
        dtype: torch.dtype,
        share: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the expected logits under a teacher's softmax, and its log Σ exp, each of shape (N,)."""

    def teacher_gradients(
        self,
        problem: LinearProblem,
        teacher: LinearProblem,
        temperature: float,
        lse: Tensor,
        coefficient: Tensor,
        wanted: Wanted,
        dtype: torch.dtype,
        share: float,
    ) -> Gradients:
        """Return the gradients of the expected logits, weighted by ``coefficient`` (N,); ``lse`` is (N,)."""


def get(impl: str, problem: LinearProblem) -> Backend:
    """Return the implementation that ``impl`` names; ``auto`` is Triton on GPUs and plain torch elsewhere.

    Raises:
        UserError: Triton is asked for where there is no GPU (nor its interpreter), or for what it can't do.
    """
    if not len(problem.e):
        impl = "cpu"  # no row, no work: plain torch runs on any device, and kernels don't start for nothing
    if impl == "auto":
        usable = problem.e.is_cuda and problem.probabilities is None and problem.e.dtype.itemsize <= 4
        impl = "triton" if usable else "cpu"
    if impl == "cpu":
        from lossworks.head.cpu import backend as plain

        return plain
    from lossworks.head.triton import backend as kernels

    reason = kernels.unusable(problem)
    if reason:
        raise UserError(f"impl='triton': {reason}; impl='cpu' does it")
    return kernels
