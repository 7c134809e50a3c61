"""The kernels behind the functions that every implementation has; see :mod:`lossworks.head.cpu.backend`."""

import os
from dataclasses import replace

import torch
from torch import Tensor

from lossworks.errors import UserError
from lossworks.head.core.filtering import weighted_classes
from lossworks.head.core.low_rank import Frozen
from lossworks.head.core.problem import Coefficients, Gradients, LinearProblem, RowSums, Softmax, Wanted
from lossworks.head.cpu.backend import Combine, FusedResult, Pass, Rule, one_after_the_other
from lossworks.head.triton import launch


def unusable(problem: LinearProblem) -> str | None:
    """Return why the kernels can't do a problem, or None if they can."""
    if problem.probabilities is not None:
        return "soft targets are not in its kernels"
    if problem.e.dtype == torch.float64:
        return "float64 is not in its kernels"
    if not problem.e.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {problem.e.device}; the kernels need a GPU (or TRITON_INTERPRET=1)"
    return None


def row_sums(problem: LinearProblem, how: Pass) -> RowSums:
    """Return the sums of every row.

    Raises:
        UserError: Class weights, label smoothing and a softcap come together.
    """
    problem = _rounded(problem, how.dtype)
    asked = {"expected": how.expected, "sums": how.totals, "predicted": how.predicted}
    asked["rows_alike"] = how.batch_invariant
    sums, _ = launch.row_sums(problem, how.softmax, **asked)
    if not how.totals or how.weights is None:
        return sums
    if problem.softcap is not None:
        raise UserError(
            "impl='triton' can't combine class_weight, label_smoothing and softcap; impl='cpu' does it"
        )
    classes = weighted_classes(problem, how.weights.float())
    # A product's order of sums may follow the number of rows.
    total = (problem.e.float() * classes).sum(1) if how.batch_invariant else problem.e.float() @ classes
    return sums._replace(total=total if problem.bias is None else total + how.weights @ problem.bias.float())


def gradients(
    problem: LinearProblem, how: Pass, sums: RowSums, coefficients: Coefficients, wanted: Wanted
) -> tuple[Gradients, Tensor | None]:
    """Return the gradients, and the probability that a filter left out of each row, (N,) or None.

    With a filter, classes are walked in the order of their mean logit.
    """
    problem = _rounded(problem, how.dtype)
    filtering = how.filtering
    found = launch.gradients(
        problem,
        how.softmax,
        sums.logsumexp,
        coefficients,
        wanted,
        expected=sums.expected,
        filter=filtering,
        order=None if filtering is None else launch.mean_logits(problem).argsort().int(),
        deterministic=filtering is None,
        rows_alike=how.batch_invariant,
        accumulate="input" if how.accumulate == "input" else "fp32",
    )
    # The kernels keep no count of the probability that they leave out of a row.
    mass = None if filtering is None else torch.full_like(sums.logsumexp, float("nan"))
    return found, mass


def fused(
    problem: LinearProblem,
    how: Pass,
    rule: Rule,
    wanted: Wanted,
    combine: Combine = lambda sums: sums,
) -> FusedResult:
    """Return losses and gradients; tiles are made twice, as there is no room to keep them."""
    return one_after_the_other(row_sums, gradients, problem, how, rule, wanted, combine)


def teacher_expected(
    problem: LinearProblem, teacher: LinearProblem, temperature: float, dtype: torch.dtype, _: float
) -> tuple[Tensor, Tensor]:
    """Return the expected logits under a teacher's softmax, and its log Σ exp, each of shape (N,)."""
    return launch.teacher_expected(_rounded(problem, dtype), teacher, Softmax(temperature))


def teacher_gradients(
    problem: LinearProblem,
    teacher: LinearProblem,
    temperature: float,
    lse: Tensor,
    coefficient: Tensor,
    wanted: Wanted,
    dtype: torch.dtype,
    _: float,
) -> Gradients:
    """Return the gradients of the expected logits, weighted by ``coefficient`` (N,); ``lse`` is (N,)."""
    return launch.teacher_gradients(
        _rounded(problem, dtype), teacher, Softmax(temperature), lse, coefficient, wanted
    )


def _rounded(problem: LinearProblem, dtype: torch.dtype) -> LinearProblem:
    """Return the problem with E and C in autocast's dtype; what is quantised stays so."""
    frozen = problem.frozen
    if frozen is not None and frozen.scale is None:
        frozen = Frozen(frozen.values.to(dtype))
    return replace(problem, e=problem.e.to(dtype), c=problem.c.to(dtype), frozen=frozen)
