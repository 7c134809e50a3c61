"""Divergences of two heads' softmaxes, row by row, from tiles of both heads' logits.

In the forward pass both heads' logits of a chunk of rows are kept until their logsumexps are known: one
product with each classifier. In the backward pass they are made again, class block by class block.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lossworks.head.core import divergences
from lossworks.head.core.problem import Gradients, LinearProblem, RowSums, Softmax, Wanted
from lossworks.head.cpu.backend import Combine
from lossworks.head.cpu.gradients import Slopes
from lossworks.head.cpu.tile_sizes import choose_tile_sizes
from lossworks.head.cpu.tiles import Logits, slices, view, walked

_FEW_ROWS = 64  # of a chunk whose logits would be above the limit


class DivergenceRule(NamedTuple):
    """Which divergence.

    Attributes:
        kind: As for :func:`lossworks.head.core.divergences.parts`.
        weight: β, of Jensen-Shannon alone.
        temperature: τ of both softmaxes.
    """

    kind: str
    weight: float
    temperature: float


class DivergenceSums(NamedTuple):
    """What the forward pass leaves of each row, all (N,), of this rank's classes but for the logsumexps.

    Attributes:
        values: The divergence.
        slopes: Σ_k ∂/∂log p_k.
        student_lse: log Σ exp(z/τ) over all classes.
        teacher_lse: The teacher's.
    """

    values: Tensor
    slopes: Tensor
    student_lse: Tensor
    teacher_lse: Tensor


def divergence_sums(
    problem: LinearProblem,
    teacher: LinearProblem,
    rule: DivergenceRule,
    dtype: torch.dtype,
    share: float,
    plan_classes: int | None,
    combine: Combine,
) -> DivergenceSums:
    """Return the divergence of every row; ``combine`` completes logsumexps with other ranks' classes."""
    student, theirs = Logits(problem, dtype), Logits(teacher, teacher.e.dtype)
    classes = plan_classes or student.classes
    size = 2 * student.wide.itemsize  # two heads' logits
    plan = choose_tile_sizes(len(student), classes, size, share, keep=True, filtered=False)
    rows_at_once = plan.rows if plan.keep else min(plan.rows, _FEW_ROWS)
    buffers = [head.buffer(rows_at_once, head.classes) for head in (student, theirs)]
    every = slice(0, student.classes)
    blocks = [block for block, _ in walked(slices(student.classes, plan.classes))]
    found = []
    for rows, times in walked(slices(len(student), rows_at_once)):
        kept = [view(buffer, every, rows) for buffer in buffers]
        for block in blocks:
            for head, logits in zip((student, theirs), kept, strict=True):
                head.tile(block, rows, logits[block]).div_(rule.temperature)
        lse = [_over_ranks(logits.logsumexp(0), combine) for logits in kept]
        values, totals = torch.zeros_like(lse[0]), torch.zeros_like(lse[0])
        for block in blocks:
            log_p, log_q = (logits[block] - one for logits, one in zip(kept, lse, strict=True))
            values += divergences.parts(rule.kind, log_p, log_q, rule.weight).sum(0)
            totals += divergences.slopes(rule.kind, log_p, log_q, rule.weight).sum(0)
        found += [(values, totals, *lse)] * times
    return DivergenceSums(*(torch.cat(column) for column in zip(*found, strict=True)))


def divergence_gradients(
    problem: LinearProblem,
    teacher: LinearProblem,
    rule: DivergenceRule,
    sums: DivergenceSums,
    upstream: Tensor,
    wanted: Wanted,
    dtype: torch.dtype,
    share: float,
) -> Gradients:
    """Return the gradients of the rows' divergences, weighted by ``upstream`` (N,); sums over all ranks."""
    student, theirs = Logits(problem, dtype), Logits(teacher, teacher.e.dtype)
    plan = choose_tile_sizes(
        len(student), student.classes, 2 * student.wide.itemsize, share, keep=False, filtered=False
    )
    found = Slopes(student, Softmax(rule.temperature), wanted, None, in_blocks=True)
    own, others = (head.buffer(plan.rows, plan.classes) for head in (student, theirs))
    factor = upstream / rule.temperature
    for block, _ in walked(slices(student.classes, plan.classes)):
        for rows, _ in walked(slices(len(student), plan.rows)):
            x = student.uncapped(block, rows, view(own, block, rows))
            bend = student.bend(x)
            log_p = student.capped(x, block, rows, x).div_(rule.temperature).sub_(sums.student_lse[rows])
            log_q = theirs.tile(block, rows, view(others, block, rows))
            log_q = log_q.div_(rule.temperature).sub_(sums.teacher_lse[rows])
            g = divergences.slopes(rule.kind, log_p, log_q, rule.weight)
            g = g.sub_(log_p.exp().mul_(sums.slopes[rows])).mul_(factor[rows])
            found.add_given(g if bend is None else g.mul_(bend), block, rows)
    return found.finish(None, None)[0]


def _over_ranks(lse: Tensor, combine: Callable[[RowSums], RowSums]) -> Tensor:
    return combine(RowSums(lse, torch.zeros_like(lse))).logsumexp
