"""Statistics of rows of logits, differentiable, without the logits.

Most losses touch a row of logits only through a few numbers. A loss is then ordinary autograd on vectors of
N numbers, and its gradient needs only one coefficient per row and statistic. The same statistics of dense
logits (:func:`row_statistics`) are for small classifiers, and are what the others are tested against.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lossworks.errors import UserError
from lossworks.head.autograd.row_sums import differentiable_row_sums
from lossworks.head.core.arguments import (
    Implementation,
    Operands,
    Options,
    all_classes,
    check_parallel,
    check_targets,
    operands,
)
from lossworks.head.core.dense_reference import dense_logits, scaled_logits
from lossworks.head.core.problem import RowSums
from lossworks.head.core.valid_rows import check_range
from lossworks.head.core.vocab_parallel import VocabParallel


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
    """

    e: Tensor
    c: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class Gathered:
    """z_ik for K classes of each row, shape (N, K), without the target's offset.

    Attributes:
        classes: int64 in [0, V), shape (..., K).
    """

    classes: Tensor = field()


Statistic = (
    Target | LogSumExp | Mean | SumOfSquares | Variance | ExpectedLogit | TeacherExpectedLogit | Gathered
)
Name = Literal["target", "logsumexp", "mean", "sum-of-squares", "variance", "expected"]
_T = TypeVar("_T")
_BY_NAME: dict[str, Statistic] = {
    "target": Target(),
    "logsumexp": LogSumExp(),
    "mean": Mean(),
    "sum-of-squares": SumOfSquares(),
    "variance": Variance(),
    "expected": ExpectedLogit(),
}


def linear_row_statistics(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    statistics: Sequence[Statistic | Name] = ("target", "logsumexp"),
    ignore_index: int = -100,
    softcap: float | None = None,
    target_offset: Tensor | None = None,
    impl: Implementation = "auto",
    vocab_parallel: VocabParallel | dist.ProcessGroup | None = None,
    buffer_share: float = 0.05,
) -> tuple[Tensor, ...]:
    r"""Return statistics of the rows of ``z = E·Cᵀ + b`` without building z, differentiable in E, C and b.

    Statistics that share a softmax (one temperature, one set of classes) share one pass over C, forward and
    backward; each further softmax costs a pass of its own.

    Args:
        e: E, shape (..., D).
        c: C, shape (V, D).
        targets: y in [0, V) or ``ignore_index``, int64, shape (...).
        bias: b, shape (V,), or None.
        statistics: Which; names stand for the defaults of the classes in this module.
        ignore_index: Target of rows whose statistics are 0, without a gradient.
        softcap: Cap s of the logits' magnitude, or None.
        target_offset: Added to :math:`z_{i,y_i}` before anything else is taken: a margin; shape (...),
            differentiable, or None.
        impl: As for :func:`lossworks.linear_cross_entropy`.
        vocab_parallel: As there; not for teachers and gathered logits.
        buffer_share: As there.

    Returns:
        One tensor a statistic, in order, float32 at least; (N,) reshaped to the targets' shape, gathered
        logits (..., K).

    Raises:
        UserError: Something does not fit together.

    Example:
        >>> e, c, y = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])
        >>> target, lse = linear_row_statistics(e, c, y)
        >>> [round(value, 4) for value in (lse - target).tolist()]  # ln 5
        [1.6094, 1.6094]
    """
    options = Options(softcap, ignore_index, impl=impl, buffer_share=buffer_share)
    head = operands(e, c, bias, vocab_parallel)
    check_parallel(head.group, impl)
    check_targets(e, targets, len(head.c), soft=False)
    if target_offset is not None and target_offset.shape != targets.shape:
        raise UserError(f"target_offset {tuple(target_offset.shape)} must be {tuple(targets.shape)}")
    chosen = _named(statistics)
    offset = None if target_offset is None else target_offset.reshape(-1)
    if impl == "reference":
        logits = dense_logits(head.e, head.c, head.bias, softcap)
        found = list(
            row_statistics(
                logits, targets.reshape(-1), chosen, ignore_index=ignore_index, target_offset=offset
            )
        )
    else:
        if head.group is None:
            check_range(targets.reshape(-1), classes=len(head.c), ignore_index=ignore_index)
        found = _Linear(head, options, targets.reshape(-1), offset, chosen).all()
    return tuple(value.reshape(*targets.shape, *value.shape[1:]) for value in found)


def row_statistics(
    logits: Tensor,
    targets: Tensor,
    statistics: Sequence[Statistic | Name] = ("target", "logsumexp"),
    *,
    ignore_index: int = -100,
    target_offset: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the same statistics of dense logits, by their definitions.

    Args:
        logits: z, shape (N, V), floating point.
        targets: Shape (N,), int64.
        statistics: As for :func:`linear_row_statistics`.
        ignore_index: As there.
        target_offset: As there, shape (N,).
    """
    check_range(targets, classes=logits.shape[1], ignore_index=ignore_index)
    ignored = targets == ignore_index
    index = torch.where(ignored, 0, targets)[:, None]
    z = logits
    if target_offset is not None:
        z = z.scatter_add(1, index, target_offset.to(z.dtype)[:, None])
    values = []
    for statistic in _named(statistics):
        value = _dense(statistic, z, logits, index)
        values.append(value.masked_fill(ignored if value.dim() == 1 else ignored[:, None], 0))
    return tuple(values)


def _dense(  # noqa: PLR0911 - one case a statistic
    statistic: Statistic, z: Tensor, without_offset: Tensor, index: Tensor
) -> Tensor:
    match statistic:
        case Target():
            return z.gather(1, index).squeeze(1)
        case LogSumExp(temperature, classes):
            return (scaled_logits(z, temperature, classes).logsumexp(1)) * temperature
        case Mean():
            return z.mean(1)
        case SumOfSquares():
            return z.square().sum(1)
        case Variance():
            return z.var(1, unbiased=False)
        case ExpectedLogit(temperature, classes):
            p = scaled_logits(z, temperature, classes).softmax(1)
            return torch.where(p > 0, p * z, 0).sum(1)
        case TeacherExpectedLogit():
            teacher = dense_logits(
                statistic.e.flatten(0, -2), statistic.c, statistic.bias, statistic.softcap
            ).detach()
            return ((teacher / statistic.temperature).softmax(1) * z).sum(1)
        case Gathered(classes):
            return without_offset.gather(1, classes.reshape(len(z), classes.shape[-1]))


def _named(statistics: Sequence[Statistic | Name]) -> list[Statistic]:
    """Replace names by what they stand for."""
    chosen: list[Statistic] = []
    for statistic in statistics:
        if not isinstance(statistic, str):
            chosen.append(statistic)
        elif statistic in _BY_NAME:
            chosen.append(_BY_NAME[statistic])
        else:
            raise UserError(f"statistic {statistic!r} must be one of {', '.join(_BY_NAME)}")
    return chosen


class _Linear:
    """Takes statistics of one linear head, each pass once."""

    def __init__(
        self,
        head: Operands,
        options: Options,
        targets: Tensor,
        offset: Tensor | None,
        statistics: list[Statistic],
    ) -> None:
        self._head, self._options, self._targets, self._offset = head, options, targets, offset
        self._statistics = statistics
        self._ignored = targets == options.ignore_index
        self._passes: dict[tuple[object, object], RowSums] = {}
        # Whether mean and squares have to be summed over the tiles.
        self._in_pass = options.softcap is not None or offset is not None or head.group is not None

    def all(self) -> list[Tensor]:
        """Return the statistics in order, 0 in ignored rows."""
        values = [self._one(statistic) for statistic in self._statistics]
        return [
            value.masked_fill(self._ignored if value.dim() == 1 else self._ignored[:, None], 0)
            for value in values
        ]

    def _one(self, statistic: Statistic) -> Tensor:  # noqa: PLR0911 - one case a statistic
        match statistic:
            case Target():
                return self._target()
            case LogSumExp(temperature, classes):
                return self._sums(temperature, classes).logsumexp * temperature
            case ExpectedLogit(temperature, classes):
                if isinstance(temperature, Tensor) and temperature.requires_grad:
                    raise UserError("ExpectedLogit has no gradient for its temperature; detach it")
                return _there(self._sums(temperature, classes).expected)
            case Mean():
                return self._mean()
            case SumOfSquares():
                return self._squares()
            case Variance():
                return self._variance()
            case TeacherExpectedLogit():
                return self._teacher(statistic)
            case Gathered(classes):
                return self._gathered(classes)

    def _sums(self, temperature: float | Tensor, classes: Tensor | None) -> RowSums:
        """Return the sums of one softmax; a pass is made once, with all that anybody asks of it."""
        key = _key(temperature, classes)
        if key not in self._passes:
            self._check(temperature, classes)
            first = not self._passes
            self._passes[key] = differentiable_row_sums(
                self._head,
                self._options,
                self._targets,
                target_offset=self._offset,
                temperature=torch.as_tensor(temperature, dtype=self._wide, device=self._targets.device),
                classes=classes,
                expected=self._wants_expected(key),
                totals=first and self._in_pass and self._wants_totals(),
            )
        return self._passes[key]

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self._head.e.dtype, torch.float32)

    def _any_softmax(self) -> tuple[float | Tensor, Tensor | None]:
        """Return the first softmax that is asked for anyway, or the plain one."""
        for statistic in self._statistics:
            if isinstance(statistic, LogSumExp | ExpectedLogit):
                return statistic.temperature, statistic.classes
        return 1.0, None

    def _wants_expected(self, key: tuple[object, object]) -> bool:
        wanted = (s for s in self._statistics if isinstance(s, ExpectedLogit))
        return key in [_key(s.temperature, s.classes) for s in wanted]

    def _wants_totals(self) -> bool:
        return any(isinstance(s, Mean | SumOfSquares | Variance) for s in self._statistics)

    def _check(self, temperature: float | Tensor, classes: Tensor | None) -> None:
        rows, v = len(self._targets), len(self._head.c)
        if isinstance(temperature, Tensor) and temperature.shape not in ((), (rows,)):
            raise UserError(f"temperature {tuple(temperature.shape)} must be one number or ({rows},)")
        if not bool((torch.as_tensor(temperature) > 0).all()):
            raise UserError("temperature must be positive in every row")
        if classes is not None and (classes.dtype != torch.bool or classes.shape != (v,)):
            raise UserError(f"classes {classes.dtype} {tuple(classes.shape)} must be torch.bool ({v},)")

    def _target(self) -> Tensor:
        """Return the target's logit: from a pass, if there is one anyway, or as a gathered product."""
        softmax = any(isinstance(s, LogSumExp | ExpectedLogit) for s in self._statistics)
        if softmax or self._head.group is not None or (self._in_pass and self._wants_totals()):
            return self._sums(*self._any_softmax()).target
        z = self._gathered(torch.where(self._ignored, 0, self._targets)[:, None]).squeeze(1)
        return z if self._offset is None else z + self._offset.to(z.dtype)

    def _mean(self) -> Tensor:
        if self._in_pass:
            return _there(self._first().total) / all_classes(self._head)
        e, c, bias = self._plain()
        mean = e @ c.mean(0)
        return mean if bias is None else mean + bias.mean()

    def _squares(self) -> Tensor:
        if self._in_pass:
            return _there(self._first().squares)
        e, c, bias = self._plain()
        squares = (e @ (c.t() @ c) * e).sum(1)
        return squares if bias is None else squares + 2 * e @ (bias @ c) + bias @ bias

    def _variance(self) -> Tensor:
        if self._in_pass:
            classes = all_classes(self._head)
            return (self._squares() / classes - self._mean().square()).clamp_min(0)
        e, c, bias = self._plain()
        c = c - c.mean(0)  # logits of mean 0, so that nothing large cancels
        squares = (e @ (c.t() @ c) * e).sum(1)
        if bias is not None:
            bias = bias - bias.mean()
            squares = squares + 2 * e @ (bias @ c) + bias @ bias
        return squares.clamp_min(0) / len(c)

    def _first(self) -> RowSums:
        """Return the pass that carries the totals."""
        self._sums(*self._any_softmax())
        return next(iter(self._passes.values()))

    def _plain(self) -> tuple[Tensor, Tensor, Tensor | None]:
        e, c, bias = self._head.e, self._head.c, self._head.bias
        return e.to(self._wide), c.to(self._wide), None if bias is None else bias.to(self._wide)

    def _teacher(self, teacher: TeacherExpectedLogit) -> Tensor:
        from lossworks.head.autograd.distillation import teacher_expected_logit

        if self._head.group is not None or self._offset is not None:
            raise UserError("TeacherExpectedLogit can't be combined with vocab_parallel or a target_offset")
        theirs = operands(teacher.e.detach(), teacher.c.detach(), teacher.bias, None)
        if len(theirs.e) != len(self._targets) or len(theirs.c) != len(self._head.c):
            raise UserError(
                f"the teacher has {len(theirs.e)} rows and {len(theirs.c)} classes, "
                f"the student {len(self._targets)} and {len(self._head.c)}"
            )
        return teacher_expected_logit(self._head, self._options, theirs, teacher.softcap, teacher.temperature)

    def _gathered(self, classes: Tensor) -> Tensor:
        if self._head.group is not None:
            raise UserError("Gathered can't be combined with vocab_parallel")
        index = classes.reshape(len(self._targets), classes.shape[-1])
        check_range(index.reshape(-1), classes=len(self._head.c), ignore_index=-(2**62))
        e, c, bias = self._head.e, self._head.c, self._head.bias
        z = torch.bmm(F.embedding(index, c).to(self._wide), e.to(self._wide)[:, :, None]).squeeze(2)
        z = z if bias is None else z + bias.to(self._wide)[index]
        cap = self._options.softcap
        return z if cap is None else cap * (z / cap).tanh()


def _key(temperature: float | Tensor, classes: Tensor | None) -> tuple[object, object]:
    """Return what tells one softmax from another."""
    return id(temperature) if isinstance(temperature, Tensor) else temperature, id(classes)


def _there(value: _T | None) -> _T:
    if value is None:
        raise RuntimeError("a statistic that was asked for is missing")
    return value
