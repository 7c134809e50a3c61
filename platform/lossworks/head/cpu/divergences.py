"""Divergences of two heads' softmaxes, row by row, from tiles of both heads' logits.

In the forward pass both heads' logits of a chunk of rows are kept until their logsumexps are known: one
product with each classifier. In the backward pass they are made again, class block by class block: six
products in all. Where a loss's slope by the divergence is known at once, :func:`fused_divergence` makes the
gradient of the logits that are kept: four products.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lossworks.head.core import divergences
from lossworks.head.core.problem import Coefficients, Gradients, LinearProblem, RowSums, Softmax, Wanted
from lossworks.head.cpu.backend import Combine, Rule
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


def fused_divergence(
    problem: LinearProblem,
    teacher: LinearProblem,
    rule: DivergenceRule,
    temperature: float,
    loss: Rule,
    wanted: Wanted,
    dtype: torch.dtype,
    share: float,
) -> tuple[Tensor, Gradients]:
    """Return the losses (N,) of rows and the gradients of their sum, from logits that are made once.

    Args:
        problem: The student's head, without a softcap, an offset and frozen columns.
        teacher: The teacher's.
        rule: Which divergence.
        temperature: τ of the logsumexp that the loss reads beside the divergence.
        loss: From a chunk's sums, with their divergence, to losses and coefficients of softmax, target and
            divergence.
        wanted: Which gradients to form.
        dtype: The student's operands are rounded to it first.
        share: Largest buffer as a share of both heads' logits.
    """
    student, theirs = Logits(problem, dtype), Logits(teacher, teacher.e.dtype)
    plan = choose_tile_sizes(
        len(student), student.classes, 2 * student.wide.itemsize, share, keep=True, filtered=False
    )
    size = plan.rows if plan.keep else min(plan.rows, _FEW_ROWS)
    chunk = _Chunk(student, theirs, rule, temperature, size, plan.classes)
    found = Slopes(student, Softmax(temperature), wanted, None, in_blocks=False)
    losses = []
    for rows in slices(len(student), size):
        values, parts = loss(chunk.take(rows), rows)
        losses.append(values)
        for block in chunk.blocks if any(wanted) else ():
            found.add_given(chunk.slope(block, parts), block, rows)
    return torch.cat(losses), found.finish(None, None)[0]


class _Chunk:
    """Both heads' logits of some rows over τ, (V, T), and later log p and log q in their place.

    Args:
        student: Whose softmax p is.
        theirs: The teacher's.
        rule: Which divergence.
        temperature: Of the logsumexp that is taken beside it.
        size: Rows at once, at most.
        classes: Classes a block.
    """

    def __init__(
        self,
        student: Logits,
        theirs: Logits,
        rule: DivergenceRule,
        temperature: float,
        size: int,
        classes: int,
    ) -> None:
        self.blocks = slices(student.classes, classes)
        self._heads, self._rule = (student, theirs), rule
        self._stores = [head.buffer(size, student.classes) for head in self._heads]
        self._scratch = student.buffer(size, classes)
        self._finite = student.problem.bias is None and theirs.problem.bias is None
        self._power = rule.temperature / temperature  # p to this power is the other softmax, up to a factor

    def take(self, rows: slice) -> RowSums:
        """Make the logits of some rows, and return their sums with the divergence."""
        zeros = self._scratch.new_zeros(rows.stop - rows.start)
        every = slice(0, self._heads[0].classes)
        self._rows, self._kept = rows, [view(store, every, rows) for store in self._stores]
        running = [_RunningTotal(zeros), _RunningTotal(zeros), _RunningTotal(zeros, self._power)]
        target = zeros.clone()
        for block in self.blocks:
            scratch = view(self._scratch, block, rows)
            tiles = [
                h.tile(block, rows, kept[block]) for h, kept in zip(self._heads, self._kept, strict=True)
            ]
            hits = self._heads[0].hits(block, rows)
            target[hits[1]] = tiles[0][hits]
            for tile, total in zip(tiles, running, strict=False):
                total.add(tile if self._rule.temperature == 1 else tile.div_(self._rule.temperature), scratch)
            if self._power != 1:
                running[2].add(tiles[0], scratch)
        student, teacher, other = (total.logsumexp() for total in running)
        other = student if self._power == 1 else other
        self._shift = student * self._power - other
        return RowSums(other, target, divergence=self._diverge(student, teacher))

    def _diverge(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergences (T,), given the logsumexps (T,); log p and log q take the logits' place."""
        rule = self._rule
        values, self._total = torch.zeros_like(student), torch.zeros_like(student)
        for block in self.blocks:
            log_p, log_q = self._kept[0][block].sub_(student), self._kept[1][block].sub_(teacher)
            values += divergences.parts(rule.kind, log_p, log_q, rule.weight, finite=self._finite).sum(0)
            if rule.kind not in _TOTALS:
                self._total += self._slopes(log_p, log_q).sum(0)
        if rule.kind in _TOTALS:
            self._total = _TOTALS[rule.kind](values)
        return values

    def slope(self, block: slice, parts: Coefficients) -> Tensor:
        """Return ∂L/∂z of a block, (B, T), for the loss's coefficients."""
        log_p, log_q = (kept[block] for kept in self._kept)
        g = self._slopes(log_p, log_q).to(log_p.dtype)
        p = torch.exp(log_p, out=view(self._scratch, block, self._rows))
        if parts.divergence is not None:
            g.addcmul_(p, -self._total).mul_(parts.divergence / self._rule.temperature)
        else:
            g.zero_()
        if parts.softmax is not None:
            if self._power != 1:
                p = torch.mul(log_p, self._power, out=p).add_(self._shift).exp_()
            g.addcmul_(p, parts.softmax)
        if parts.target is not None:
            hits = self._heads[0].hits(block, self._rows)
            g[hits] += parts.target[hits[1]]
        return g

    def _slopes(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        rule = self._rule
        return divergences.slopes(rule.kind, log_p, log_q, rule.weight, finite=self._finite)


_TOTALS: dict[str, Callable[[Tensor], Tensor]] = {
    "forward-kl": lambda values: torch.full_like(values, -1),
    "reverse-kl": lambda values: values + 1,
}
"""Σ_k ∂/∂log p_k over all classes, from the divergences (T,), where it is known."""


class _RunningTotal:
    """Σ_k exp(s·u_k) of rows, taken tile by tile with a running maximum.

    Args:
        zeros: Shape (T,).
        scale: The factor s.
    """

    def __init__(self, zeros: Tensor, scale: float = 1.0) -> None:
        self._max, self._sum, self._scale = zeros + torch.finfo(zeros.dtype).min, zeros, scale

    def add(self, u: Tensor, scratch: Tensor) -> None:
        """Take a tile (B, T) in, with room of its shape."""
        if self._scale != 1:
            u = torch.mul(u, self._scale, out=scratch)
        largest = torch.maximum(self._max, u.amax(0))
        e = torch.sub(u, largest, out=scratch).exp_()
        self._sum = self._sum * (self._max - largest).exp_() + e.sum(0)
        self._max = largest

    def logsumexp(self) -> Tensor:
        """Return log Σ_k exp(s·u_k), (T,)."""
        return self._max + self._sum.log()


def _over_ranks(lse: Tensor, combine: Callable[[RowSums], RowSums]) -> Tensor:
    return combine(RowSums(lse, torch.zeros_like(lse))).logsumexp
