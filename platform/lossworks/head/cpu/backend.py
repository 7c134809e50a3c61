"""The head in plain torch: exact sums of every row, and the gradient in the same pass or after it.

Two orders of the same tiles. *Kept*: for a chunk of rows, the logits of all classes are made once (product
1), and with the sums known, each tile becomes ∂L/∂z in place and goes into ∂E and ∂C (products 2 and 3); the
buffer of V × rows is the only thing that grows with V besides ∂C. *Twice*: the sums of all rows first, then
class block by class block the logits again: a fourth product, but no buffer that grows with V, ∂C is finished
block by block, and narrow dtypes are rounded once. A chunk of at most D rows can be kept without a buffer: in
the memory of ∂C, block by block before its gradient is written there. It runs on any device; CPUs are what it
is tuned for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lossworks.head.core.fixed_rows import FixedRows
from lossworks.head.core.problem import (
    Coefficients,
    Filter,
    Gradients,
    LinearProblem,
    RowSums,
    Softmax,
    Wanted,
)
from lossworks.head.cpu.gradients import Slopes
from lossworks.head.cpu.tile_sizes import (
    FIXED_ROWS,
    TileSizes,
    borrowing,
    choose_tile_sizes,
    fixed_tile_sizes,
)
from lossworks.head.cpu.tiles import Logits, RunningSums, Weighted, slices, view, walked

Rule = Callable[[RowSums, slice], tuple[Tensor, Coefficients]]
"""From the sums of some rows to their losses (T,) and the coefficients of the gradient of their sum."""

Combine = Callable[[RowSums], RowSums]
"""Completes the sums of some rows with those of other ranks' classes."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What is taken of the logits as they pass, and how.

    Attributes:
        dtype: The inputs are rounded to it first.
        softmax: Temperature and classes of the logsumexp.
        expected: Whether Σ p z is wanted.
        totals: Whether Σ w z and Σ z² are wanted.
        predicted: Whether the class of the largest logit is wanted.
        weights: w, shape (V,), or None for 1.
        filtering: What the gradient may leave out, or None.
        share: Largest buffer as a share of the logits.
        plan_classes: V for the choice of tiles, where ranks that hold different numbers of classes must
            choose alike; None for those of C.
        accumulate: ``"fp32"``, or ``"input"`` for gradients added up in the inputs' dtype, where that is
            offered: not here.
        batch_invariant: Whether a row's sums and gradient are to have the same bits in any batch.
        wide_results: Whether gradients stay float32 where the inputs are narrower, since what they will be
            multiplied by is not known yet.
    """

    dtype: torch.dtype
    softmax: Softmax = field(default_factory=Softmax)
    expected: bool = False
    totals: bool = False
    predicted: bool = False
    weights: Tensor | None = None
    filtering: Filter | None = None
    share: float = 0.05
    plan_classes: int | None = None
    accumulate: str = "fp32"
    wide_results: bool = False
    batch_invariant: bool = False

    def plan(self, logits: Logits, *, keep: bool, filtered: bool) -> TileSizes:
        """Choose the tiles of a pass over logits."""
        classes = self.plan_classes or logits.classes
        if self.batch_invariant:
            return fixed_tile_sizes(classes)
        size = logits.wide.itemsize
        return choose_tile_sizes(len(logits), classes, size, self.share, keep=keep, filtered=filtered)

    def sums(self, logits: Logits, rows: slice) -> RunningSums:
        """Return the running sums of a chunk of rows."""
        return RunningSums(
            logits,
            self.softmax,
            rows,
            expected=self.expected,
            totals=self.totals,
            predicted=self.predicted,
            weights=self.weights,
        )


@dataclass(frozen=True, eq=False)
class FusedResult:
    """What a pass gives.

    Attributes:
        sums: Of every row.
        losses: Shape (N,).
        gradients: Of the summed losses.
        mass: The probability that a filter left out of each row, shape (N,), or None without a filter.
    """

    sums: RowSums
    losses: Tensor
    gradients: Gradients
    mass: Tensor | None


def row_sums(problem: LinearProblem, how: Pass) -> RowSums:
    """Return the sums of every row, in one product."""
    given = slice(0, len(problem.e))
    if how.batch_invariant:
        filled = FixedRows(len(problem.e), FIXED_ROWS)
        problem, how = filled.problem(problem), replace(how, softmax=filled.softmax(how.softmax))
    logits = Logits(problem, how.dtype)
    plan = how.plan(logits, keep=False, filtered=False)
    buffer, scratch = (logits.buffer(plan.rows, plan.classes) for _ in range(2))
    parts = []
    for rows, times in walked(slices(len(logits), plan.rows)):
        sums = how.sums(logits, rows)
        for block, _ in walked(slices(logits.classes, plan.classes)):
            z = logits.tile(block, rows, view(buffer, block, rows))
            sums.add(z, block, view(scratch, block, rows))
        parts += [sums.finish()] * times
    return _joined(parts).part(given)


def gradients(
    problem: LinearProblem, how: Pass, sums: RowSums, coefficients: Coefficients, wanted: Wanted
) -> tuple[Gradients, Tensor | None]:
    """Return the gradients for coefficients that are known by now, in three more products.

    Args:
        problem: As for :func:`row_sums`.
        how: As for :func:`row_sums`.
        sums: Its result, which may come from more classes than these: other ranks', too.
        coefficients: Of every row.
        wanted: Which gradients to form.

    Returns:
        The gradients, and with a filter the probability left out of each row, shape (N,).
    """
    given = slice(0, len(problem.e))
    if how.batch_invariant:
        filled = FixedRows(len(problem.e), FIXED_ROWS)
        problem, how = filled.problem(problem), replace(how, softmax=filled.softmax(how.softmax))
        sums, coefficients = filled.sums(sums), filled.coefficients(coefficients)
    logits = Logits(problem, how.dtype)
    plan = how.plan(logits, keep=False, filtered=how.filtering is not None)
    slopes = Slopes(
        *(logits, how.softmax, wanted, how.filtering),
        in_blocks=not how.wide_results,
        rows_alike=how.batch_invariant,
    )
    buffer = logits.buffer(plan.rows, plan.classes)
    chunks = walked(slices(len(logits), plan.rows))
    parts = [(rows, sums.part(rows), coefficients.part(rows)) for rows, _ in chunks]
    for block, _ in walked(slices(logits.classes, plan.classes)):
        for rows, row_part, coefficient_part in parts:
            x = logits.uncapped(block, rows, view(buffer, block, rows))
            bend = logits.bend(x)
            z = logits.capped(x, block, rows, x)
            slopes.add(z, block, rows, row_part, coefficient_part, bend=bend)
    found, mass = slopes.finish(coefficients.constant, coefficients.constant_weights)
    return found._replace(e=None if found.e is None else found.e[given]), mass


def fused(
    problem: LinearProblem,
    how: Pass,
    rule: Rule,
    wanted: Wanted,
    combine: Combine = lambda sums: sums,
) -> FusedResult:
    """Return losses and their sum's gradients, where coefficients depend on the row's own sums alone.

    The rule's coefficients have no linear part, and an expected part only if Σ p z was asked for.

    Three products if the chunks' logits may be kept, otherwise four; one if no gradient is wanted.

    Args:
        problem: E, C, targets and how logits are made.
        how: What is taken of them.
        rule: The loss.
        wanted: Which gradients to form.
        combine: Completes the sums of some rows with those of other ranks' classes.
    """
    if how.batch_invariant:  # the two orders of tiles round differently, so one is for all
        return one_after_the_other(row_sums, gradients, problem, how, rule, wanted, combine)
    logits = Logits(problem, how.dtype)
    # A narrow ∂C would need a wide accumulator as large as C; class block by class block it needs none.
    may_keep = any(wanted) and problem.c.dtype == logits.wide
    plan = how.plan(logits, keep=may_keep, filtered=how.filtering is not None)
    if may_keep and wanted[1]:
        plan = borrowing(plan, len(problem.e), problem.c.shape[1])
    if plan.keep:
        return _kept(logits, how, plan, rule, wanted, combine)
    return one_after_the_other(row_sums, gradients, problem, how, rule, wanted, combine)


def one_after_the_other(
    row_sums: Callable[[LinearProblem, Pass], RowSums],
    gradients: Callable[
        [LinearProblem, Pass, RowSums, Coefficients, Wanted], tuple[Gradients, Tensor | None]
    ],
    problem: LinearProblem,
    how: Pass,
    rule: Rule,
    wanted: Wanted,
    combine: Combine,
) -> FusedResult:
    """Return losses and gradients from any implementation's two functions, the logits being made twice.

    The shapes are those of :class:`LinearProblem`, :class:`RowSums` and :class:`Gradients`.
    """
    sums = combine(row_sums(problem, how))
    losses, coefficients = rule(sums, slice(0, len(problem.e)))
    if not any(wanted):
        return FusedResult(sums, losses, Gradients(None, None, None), None)
    return FusedResult(sums, losses, *gradients(problem, how, sums, coefficients, wanted))


def _kept(
    logits: Logits,
    how: Pass,
    plan: TileSizes,
    rule: Rule,
    wanted: Wanted,
    combine: Combine,
) -> FusedResult:
    """Make the logits of a chunk of rows once, and its gradients from them."""
    slopes = Slopes(logits, how.softmax, wanted, how.filtering, in_blocks=False)
    blocks = [block for block, _ in walked(slices(logits.classes, plan.classes))]
    every = slice(0, logits.classes)
    size = len(logits) if plan.borrow else plan.rows
    store = None if plan.borrow else logits.buffer(size, logits.classes)
    # Exponentials take the logits' place in the store, unless a part of the gradient asks for logits. With a
    # softcap the store keeps what is capped, since its slope can't be had of capped logits to all digits.
    softcap = logits.problem.softcap is not None
    in_place = not softcap and not how.expected
    scratch = None if in_place else logits.buffer(size, plan.classes)
    capped = logits.buffer(size, plan.classes) if softcap else None
    done: list[tuple[Tensor, RowSums, Tensor | None]] = []
    weights = None
    for rows, times in walked(slices(len(logits), size)):
        chunk = slopes.borrowed() if store is None else view(store, every, rows)
        partial = how.sums(logits, rows)
        bases: list[Tensor | None] = []
        for block in blocks:
            z = logits.uncapped(block, rows, chunk[block])
            z = logits.capped(z, block, rows, z if capped is None else view(capped, block, rows))
            base = partial.add(z, block, z if scratch is None else view(scratch, block, rows))
            bases.append(base if in_place else None)
        sums = combine(partial.finish())
        losses, coefficients = rule(sums, rows)
        for block, shift in zip(blocks, bases, strict=True):
            z = slopes.give_back(block) if store is None else chunk[block]
            # A borrowed chunk is all rows, of which a filter takes fewer at a time.
            for part in slices(len(z[0]), plan.rows):
                known = None if shift is None else shift[part]
                place = slice(rows.start + part.start, rows.start + part.stop)
                tile, bend = z[:, part], None
                if softcap:
                    bend, tile = logits.bend(tile), logits.capped(tile, block, place, tile)
                slopes.add(tile, block, place, sums.part(part), coefficients.part(part), known, bend)
        weights = coefficients.constant_weights
        done += [(losses, sums, coefficients.constant)] * times
    losses_of, sums_of, constants = zip(*done, strict=True)
    constant = None if constants[0] is None else torch.cat(constants)
    return FusedResult(_joined(sums_of), torch.cat(losses_of), *slopes.finish(constant, weights))


def teacher_expected(
    problem: LinearProblem, teacher: LinearProblem, temperature: float, dtype: torch.dtype, share: float
) -> tuple[Tensor, Tensor]:
    """Return Σ_k q_ik z_ik with q = softmax of the teacher's logits over τ, and its log Σ exp; each (N,)."""
    student, theirs = Logits(problem, dtype), Logits(teacher, teacher.e.dtype)
    plan = Pass(dtype, share=share).plan(student, keep=False, filtered=False)
    buffer, scratch = (head.buffer(plan.rows, plan.classes) for head in (student, theirs))
    parts = []
    for rows, times in walked(slices(len(student), plan.rows)):
        sums = Weighted(len(student.e[rows]), scratch)
        for block, _ in walked(slices(student.classes, plan.classes)):
            z = student.tile(block, rows, view(buffer, block, rows))
            sums.add(theirs.tile(block, rows, view(scratch, block, rows)).div_(temperature), z)
        parts += [sums.finish()] * times
    expected, lse = zip(*parts, strict=True)
    return torch.cat(expected).to(student.wide), torch.cat(lse)


def teacher_gradients(
    problem: LinearProblem,
    teacher: LinearProblem,
    temperature: float,
    lse: Tensor,
    coefficient: Tensor,
    wanted: Wanted,
    dtype: torch.dtype,
    share: float,
) -> Gradients:
    """Return the gradients for ∂L/∂z_ik = coefficient_i·q_ik of the student; both tensors are (N,)."""
    student, theirs = Logits(problem, dtype), Logits(teacher, teacher.e.dtype)
    how = Pass(dtype, share=share)
    plan = how.plan(student, keep=False, filtered=False)
    slopes = Slopes(student, how.softmax, wanted, None, in_blocks=True)
    buffer, scratch = (head.buffer(plan.rows, plan.classes) for head in (student, theirs))
    for block, _ in walked(slices(student.classes, plan.classes)):
        for rows, _ in walked(slices(len(student), plan.rows)):
            q = theirs.tile(block, rows, view(scratch, block, rows)).div_(temperature)
            g = q.sub_(lse[rows]).exp_().mul_(coefficient[rows]).to(student.wide)
            if problem.softcap is not None:
                bend = student.bend(student.uncapped(block, rows, view(buffer, block, rows)))
                g = g if bend is None else g.mul_(bend)
            slopes.add_given(g, block, rows)
    return slopes.finish(None, None)[0]


def _joined(parts: Sequence[RowSums]) -> RowSums:
    """Put the sums of chunks one after the other."""
    lse, target, *others = zip(*parts, strict=True)
    rest = (None if column[0] is None else torch.cat(column) for column in others)
    return RowSums(torch.cat(lse), torch.cat(target), *rest)
