"""The head on a GPU: row sums and gradients by the kernels of this package.

Inputs are float32, float16 or bfloat16 of any strides; results are float32. Under ``TRITON_INTERPRET=1``, set
before Triton is imported, everything runs on the CPU, slowly: that is how it is tested.
"""

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lossworks.head.core.filtering import add_rank_one
from lossworks.head.core.problem import (
    Coefficients,
    Filter,
    Gradients,
    LinearProblem,
    RowSums,
    Softmax,
    Wanted,
)
from lossworks.head.triton.calls import (
    KernelCall,
    choose,
    fused_call,
    is_lean,
    parts_of,
    row_gradients_call,
    row_sums_call,
    slab_call,
    target_of,
)
from lossworks.head.triton.kernels import Parts
from lossworks.head.triton.tiles import Kernel, Tile


@torch.no_grad()
def row_sums(
    problem: LinearProblem,
    softmax: Softmax,
    *,
    expected: bool = False,
    sums: bool = False,
    predicted: bool = False,
    order: bool = False,
    rows_alike: bool = False,
) -> tuple[RowSums, Tensor | None]:
    """Return the sums of each row after one pass over tiles of logits.

    Each program walks the classes of its split with an online softmax (Milakov and Gimelshein,
    arXiv:1805.02867); the splits are merged in a fixed order, so results repeat bit for bit.

    Args:
        problem: Rows and classifier.
        softmax: Its temperature and classes.
        expected: Whether to return Σ_k p_ik z_ik.
        sums: Whether to return Σ_k z_ik and Σ_k z_ik².
        predicted: Whether to return the largest logit and its class.
        order: Whether to return the mean logits, by which classes are sorted for a :class:`Filter`.
        rows_alike: Whether a row's sums are to have the same bits whatever rows there are.

    Returns:
        The sums, and :func:`mean_logits` or None.
    """
    asked = {"expected": expected, "sums": sums, "predicted": predicted}
    parts = _walk(problem, softmax, None, **asked, rows_alike=rows_alike)
    top, log_total, mean = _merged(parts)
    total, squares = (_in_order(parts[4]), _in_order(parts[5])) if sums else (None, None)
    largest = best = None
    if predicted:
        largest, split = parts[6].max(0)
        best = parts[7].view(torch.int32).gather(0, split[None])[0].long()
    expected_logit = mean if expected else None
    found = RowSums(
        *(top + log_total, _in_order(parts[2]), expected_logit, total, squares, top, log_total, largest, best)
    )
    return found, mean_logits(problem) if order else None


@torch.no_grad()
def teacher_expected(
    problem: LinearProblem, teacher: LinearProblem, teacher_softmax: Softmax
) -> tuple[Tensor, Tensor]:
    """Return Σ_k q_ik z_ik, q the teacher's softmax and z the student's logits, and the teacher's logsumexp.

    Args:
        problem: The student.
        teacher: Another problem over the same rows and classes, of the same dtype, with features of its own.
        teacher_softmax: What makes q of the teacher's logits.

    Returns:
        Both of shape (N,), float32.
    """
    parts = _walk(
        teacher, teacher_softmax, problem, expected=True, sums=False, predicted=False, rows_alike=False
    )
    top, log_total, mean = _merged(parts)
    return mean, top + log_total


@torch.no_grad()
def gradients(
    problem: LinearProblem,
    softmax: Softmax,
    logsumexp: Tensor,
    coefficients: Coefficients,
    wanted: Wanted,
    *,
    expected: Tensor | None = None,
    filter: Filter | None = None,  # noqa: A002 - the name in the interface of the head
    order: Tensor | None = None,
    deterministic: bool = False,
    rows_alike: bool = False,
    accumulate: Literal["fp32", "input"] = "fp32",
) -> Gradients:
    """Return the gradients of E, C and the bias.

    Exact gradients go by slabs: a kernel writes ∂L/∂z of some classes, and two matrix products of the
    vendor's library take it from there, in a fixed order. That is the default because unfiltered atomic
    additions cost more than the arithmetic: Wijmans et al. (arXiv:2411.09009, table 1) measured 314 ms where
    the products take 93 ms at peak. Only where a filter drops tiles does the fused kernel pay.

    Args:
        problem: Rows and classifier.
        softmax: Its temperature and classes.
        logsumexp: Of :func:`row_sums`.
        coefficients: Of the gradient of the loss.
        wanted: Whether E, C and the bias need a gradient.
        expected: Of :func:`row_sums`, needed by ``coefficients.expected``.
        filter: Which tiles may be dropped. It applies to coefficients of softmax, target and, without
            softcap, constant; with others, and for float32 inputs on a GPU, the gradients are exact.
        order: A permutation of classes, int32, shape (V,), in which the fused kernel's tiles take them.
        deterministic: Give the same bits each time; the filter is then ignored.
        rows_alike: Whether a row of ∂E is to have the same bits whatever rows there are, too.
        accumulate: ``"fp32"``, or ``"input"`` for gradients in the dtype of the inputs. By slabs they are
            rounded once. In the fused kernel every tile rounds, and the error grows with their number: a
            bfloat16 sum stops growing where it is 2⁸ times its terms.

    Returns:
        The gradients, float32 unless ``accumulate`` is ``"input"``; the bias's always is.
    """
    dtype = torch.float32 if accumulate == "fp32" else problem.e.dtype
    if filter is not None and not (deterministic or rows_alike) and _filterable(problem, coefficients):
        return _fused(problem, softmax, logsumexp, coefficients, wanted, filter, order, dtype)
    source = _Source(problem, softmax, parts_of(coefficients, logsumexp, expected), None)
    lean = is_lean(problem, softmax, coefficients)
    return _by_slabs(
        *(problem, source, wanted, dtype),
        lean=lean,
        search=not (deterministic or rows_alike),
        rows_alike=rows_alike,
    )


@torch.no_grad()
def teacher_gradients(
    problem: LinearProblem,
    teacher: LinearProblem,
    teacher_softmax: Softmax,
    teacher_logsumexp: Tensor,
    coefficient: Tensor,
    wanted: Wanted,
) -> Gradients:
    """Return the student's gradients, float32, where ∂L/∂z_ik = coefficient_i·q_ik.

    Args:
        problem: The student.
        teacher: As in :func:`teacher_expected`.
        teacher_softmax: As in :func:`teacher_expected`.
        teacher_logsumexp: Of :func:`teacher_expected`.
        coefficient: Shape (N,).
        wanted: Whether the student's E, C and bias need a gradient.
    """
    parts = parts_of(Coefficients(softmax=coefficient), teacher_logsumexp, None)
    source = _Source(teacher, teacher_softmax, parts, problem)
    return _by_slabs(problem, source, wanted, torch.float32, lean=False, search=True, rows_alike=False)


def _walk(
    problem: LinearProblem,
    softmax: Softmax,
    other: LinearProblem | None,
    *,
    expected: bool,
    sums: bool,
    predicted: bool,
    rows_alike: bool,
) -> Tensor:
    """Return what :func:`row_sums_kernel` writes for each split, (8, splits, N)."""
    target = target_of(problem.e)
    steps = target.walk if rows_alike else None

    def call(tile: Tile) -> KernelCall:
        asked = {"expected": expected, "sums": sums, "predicted": predicted}
        return row_sums_call(problem, softmax, other, tile, target.programs, **asked, walk=steps)

    lean = other is None and not (expected or sums or predicted) and is_lean(problem, softmax, Coefficients())
    kernel: Kernel = "row_sums" if other is None else "teacher"
    chosen = call(choose(kernel, problem, lean=lean, trial=None if rows_alike else call))
    chosen()
    parts: Tensor = chosen.arguments["parts_ptr"]
    return parts


def _merged(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maximum m, log Σ exp(z − m) and Σ p z, each (N,)."""
    top = parts[0].amax(0)
    # In a row without any class all are −inf, and −inf − (−inf) would be NaN.
    weights = (parts[0] - top.where(top > -torch.inf, 0.0)).exp()
    total = _in_order(weights * parts[1])
    return top, total.log(), _in_order(weights * parts[3]) / total


def _in_order(parts: Tensor) -> Tensor:
    """Return the sums (N,) of splits (S, N), each row's in the same order, whatever rows there are."""
    return functools.reduce(torch.add, parts.unbind())


def mean_logits(problem: LinearProblem) -> Tensor:
    """Return the mean over rows of each class's logit before softcap and offset, C·ē + b, shape (V,).

    It has the precision of the inputs' dtype: sorting needs no more.
    """
    row = problem.e.mean(0, dtype=torch.float32).to(problem.c.dtype)
    mean = torch.mv(problem.c, row).float()  # of whole classifiers alone, which are all that is filtered
    return mean if problem.bias is None else mean + problem.bias


class _Source(NamedTuple):
    """What ∂L/∂z is made of; arguments of :func:`slab_call`."""

    problem: LinearProblem
    softmax: Softmax
    parts: Parts
    other: LinearProblem | None


def _by_slabs(
    problem: LinearProblem,
    source: _Source,
    wanted: Wanted,
    dtype: torch.dtype,
    *,
    lean: bool,
    search: bool,
    rows_alike: bool,
) -> Gradients:
    """Return the gradients of ``problem``, E's summed in float32 and C's rounded once to ``dtype``."""
    e, c = problem.e, problem.c
    buffer = e.new_empty(len(e), _slab_width(e, len(c), rows_alike=rows_alike))

    def call(tile: Tile, first: int = 0) -> KernelCall:
        return slab_call(*source, buffer[:, : len(c) - first], first, tile)

    kernel: Kernel = "slab" if source.other is None else "teacher"
    tile = choose(kernel, source.problem, lean=lean, trial=call if search else None)
    sums = _zeros(problem, wanted, torch.float32, dtype)
    for first in range(0, len(c), buffer.shape[1]):
        call(tile, first)()
        g, part = buffer[:, : len(c) - first], slice(first, first + buffer.shape[1])
        if sums.e is not None:
            classes = problem.classes(part, e.dtype)
            if rows_alike:
                row_gradients_call(problem, g, classes, sums.e, choose("row_gradients", problem))()
            else:
                sums.e.add_(_product(g, classes))
        if sums.c is not None:
            sums.c[part] = _product(g.t(), problem.own_e)
        if sums.bias is not None:
            sums.bias[part] = g.sum(0, dtype=torch.float32)
    return sums._replace(e=None if sums.e is None else sums.e.to(dtype))


def _slab_width(e: Tensor, classes: int, *, rows_alike: bool) -> int:
    """Return how many classes a slab takes, a multiple of a tile's."""
    target = target_of(e)
    block = target.tiles["slab", e.element_size()][0].classes
    if rows_alike:
        return min(classes, target.walk * block)
    width = target.slab_bytes // (len(e) * e.element_size())
    return min(classes, max(block, width // block * block))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a·b in float32, without rounding the result to the factors' dtype where that can be had."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and not torch.version.hip:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _zeros(problem: LinearProblem, wanted: Wanted, e_dtype: torch.dtype, c_dtype: torch.dtype) -> Gradients:
    e, c = problem.e, problem.c
    return Gradients(
        e.new_zeros(e.shape, dtype=e_dtype) if wanted[0] else None,
        c.new_zeros(c.shape, dtype=c_dtype) if wanted[1] else None,
        c.new_zeros(len(c), dtype=torch.float32) if wanted[2] else None,
    )


def _filterable(problem: LinearProblem, coefficients: Coefficients) -> bool:
    """Return whether ∂L/∂z is small where p is, up to a part of rank one that can be taken out."""
    others = coefficients.expected is not None or coefficients.linear is not None
    in_slope = coefficients.constant is not None and problem.softcap is not None
    shipped = ("fused", problem.e.element_size()) in target_of(problem.e).tiles
    whole = problem.frozen is None
    return shipped and whole and coefficients.softmax is not None and not others and not in_slope


def _fused(
    problem: LinearProblem,
    softmax: Softmax,
    logsumexp: Tensor,
    coefficients: Coefficients,
    wanted: Wanted,
    filter: Filter,  # noqa: A002
    order: Tensor | None,
    dtype: torch.dtype,
) -> Gradients:
    e, c = problem.e, problem.c
    small = Coefficients(softmax=coefficients.softmax, target=coefficients.target)
    parts = parts_of(small, logsumexp, None)
    sums = _zeros(problem, wanted, dtype, dtype)
    masses = (e.new_zeros(len(e), dtype=torch.float32), e.new_zeros(len(c), dtype=torch.float32))
    # No search for the fastest tile: trials would add to the sums.
    tile = choose("fused", problem)
    fused_call(
        problem, softmax, parts, order, sums, masses if filter.repair else (None, None), filter.eps, tile
    )()
    if filter.repair:
        # What was dropped is replaced by rank one with its row and column sums; see `core.filtering`.
        rows, classes = masses
        share = classes / classes.sum().clamp_min(torch.finfo(torch.float32).tiny)
        # The kernel gave the bias its column sums already.
        add_rank_one(sums._replace(bias=None), problem, rows.copysign(parts.softmax), share)
    if coefficients.constant is not None:
        weights = coefficients.constant_weights
        ones = e.new_ones(len(c), dtype=torch.float32)
        share = ones if weights is None else weights.float()
        add_rank_one(sums, problem, coefficients.constant.float(), share)
    return sums
