"""Statistics of one linear head: those that share a softmax share one pass over the logits."""

from typing import TypeVar

import torch
from torch import Tensor

from lossworks.adapters.torch_private import without_values
from lossworks.errors import UserError
from lossworks.head.autograd.differentiable_row_sums import differentiable_row_sums
from lossworks.head.core.arguments import Operands, Options, all_classes, in_full_precision, operands
from lossworks.head.core.divergences import check_divergence
from lossworks.head.core.problem import RowSums
from lossworks.head.core.valid_rows import blanked, check_range
from lossworks.head.core.vocab_parallel import Shard, sum_gradient_over_ranks, sum_over_ranks
from lossworks.head.statistics import (
    Divergence,
    ExpectedLogit,
    Gathered,
    LogSumExp,
    Mean,
    Predicted,
    Statistic,
    SumOfSquares,
    Target,
    TeacherExpectedLogit,
    TopKDivergence,
    Variance,
)

_T = TypeVar("_T")


class SharedPasses:
    """Takes statistics of one linear head, each pass once.

    Args:
        head: E, C and bias.
        options: What the caller chose.
        targets: Shape (N,), int64.
        offset: Of the targets' logits, shape (N,), differentiable, or None.
        statistics: Which are asked for.
    """

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
        self._blanked: Tensor | None = None
        self._passes: dict[tuple[object, object], RowSums] = {}
        # Whether mean and squares have to be summed over the tiles.
        by_tiles = (options.softcap, offset, head.group, head.frozen, options.batch_invariant or None)
        self._in_pass = any(reason is not None for reason in by_tiles)

    def all(self) -> list[Tensor]:
        """Return the statistics in order, each of shape (N,) or (N, K), 0 in ignored rows."""
        # What is not made in a pass is computed as it is there: of operands rounded once, in float32.
        with in_full_precision(self._head.e.device):
            values = [self._one(statistic) for statistic in self._statistics]
        return [masked(value, self._ignored) for value in values]

    def _one(self, statistic: Statistic) -> Tensor:  # noqa: C901, PLR0911 - one case a statistic
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
            case Divergence():
                return self._divergence(statistic)
            case TopKDivergence():
                return self._top_k_divergence(statistic)
            case Gathered(classes):
                return self._gathered(classes)
            case Predicted():
                return self._predicted()

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
                predicted=first and any(isinstance(s, Predicted) for s in self._statistics),
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
        given = torch.as_tensor(temperature)
        if not without_values(given) and not bool((given > 0).all()):
            raise UserError("temperature must be positive in every row")
        if classes is not None and (classes.dtype != torch.bool or classes.shape != (v,)):
            raise UserError(f"classes {classes.dtype} {tuple(classes.shape)} must be torch.bool ({v},)")

    def _target(self) -> Tensor:
        """Return the target's logit: from a pass, if there is one anyway, or as a gathered product."""
        softmax = any(isinstance(s, LogSumExp | ExpectedLogit | Predicted) for s in self._statistics)
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

    def _rows(self) -> Tensor:
        """Return E for what takes no pass: passes drop ignored rows, here they are 0."""
        if self._blanked is None:
            self._blanked = blanked(self._head.e, self._ignored)
        return self._blanked

    def _first(self) -> RowSums:
        """Return the pass that carries the totals."""
        self._sums(*self._any_softmax())
        return next(iter(self._passes.values()))

    def _plain(self) -> tuple[Tensor, Tensor, Tensor | None]:
        e, c = (x.to(self._head.dtype).to(self._wide) for x in (self._rows(), self._head.c))
        return e, c, None if self._head.bias is None else self._head.bias.to(self._wide)

    def _teacher(self, teacher: TeacherExpectedLogit) -> Tensor:
        from lossworks.head.autograd.distillation import teacher_expected_logit

        if self._offset is not None:
            raise UserError("TeacherExpectedLogit can't be combined with a target_offset")
        student, theirs = self._beside(teacher)
        return teacher_expected_logit(
            *(student, self._options, self._targets, theirs, teacher.softcap, teacher.temperature)
        )

    def _predicted(self) -> Tensor:
        if self._offset is not None:
            raise UserError("Predicted can't be combined with a target_offset; linear_top_k gives the class")
        return _there(self._first().predicted)

    def _divergence(self, wanted: Divergence) -> Tensor:
        from lossworks.head.autograd.divergence import divergence
        from lossworks.head.cpu.divergences import DivergenceRule

        check_divergence(wanted.kind, wanted.weight)
        self._check(wanted.temperature, None)
        if self._offset is not None:
            raise UserError("Divergence can't be combined with a target_offset")
        if self._options.impl == "triton":
            raise UserError("Divergence: impl='triton' has no kernel of it; auto takes GPUs' own products")
        student, theirs = self._beside(wanted)
        rule = DivergenceRule(wanted.kind, wanted.weight, float(wanted.temperature))
        return divergence(student, self._options, self._targets, theirs, wanted.softcap, rule)

    def _top_k_divergence(self, wanted: TopKDivergence) -> Tensor:
        check_divergence(wanted.kind, wanted.weight)
        z = self._gathered(wanted.classes)
        if self._offset is not None:
            raise UserError("TopKDivergence can't be combined with a target_offset")
        log_p = z / wanted.temperature - self._sums(wanted.temperature, None).logsumexp[:, None]
        return wanted.of(log_p)

    def _beside(self, teacher: TeacherExpectedLogit | Divergence) -> tuple[Operands, Operands]:
        """Return both heads with the classes that they share.

        Raises:
            UserError: They differ in rows or classes.
        """
        for other, there in (
            ("a LowRankClassifier", self._head.frozen is not None),
            ("batch_invariant=True", self._options.batch_invariant),
        ):
            if there:
                raise UserError(f"{type(teacher).__name__} can't be combined with {other}")
        theirs = operands(teacher.e.detach(), teacher.c.detach(), teacher.bias, None)
        student, k = self._head, teacher.classes
        if k is not None:
            if student.group is not None or not 1 <= k <= min(len(theirs.c), len(student.c)):
                raise UserError(
                    f"classes={k} of the teacher must be in [1, {min(len(theirs.c), len(student.c))}], "
                    "and vocab_parallel None"
                )
            student, theirs = (
                head._replace(c=head.c[:k], bias=None if head.bias is None else head.bias[:k])
                for head in (student, theirs)
            )
        if len(theirs.e) != len(self._targets) or len(theirs.c) != len(student.c):
            raise UserError(
                f"the teacher has {len(theirs.e)} rows and {len(theirs.c)} classes, "
                f"the student {len(self._targets)} and {len(student.c)}"
                + (" on this rank" if student.group is not None else "; classes=K takes the first K of both")
            )
        return student, theirs

    def _gathered(self, classes: Tensor) -> Tensor:
        index = classes.reshape(len(self._targets), classes.shape[-1])
        check_range(index.reshape(-1), classes=all_classes(self._head), ignore_index=-(2**62))
        e, group = self._rows(), self._head.group
        if group is None:
            return self._logits_at(e, index)
        shard = Shard.of(group, len(self._head.c), e.device)
        local = shard.local(index)
        e = sum_gradient_over_ranks(e, shard.group) if self._head.reduce_e else e
        z = self._logits_at(e, local.clamp(min=0))
        return sum_over_ranks(z.masked_fill(local < 0, 0), shard.group)

    def _logits_at(self, e: Tensor, index: Tensor) -> Tensor:
        """Return the logits of K classes of this C for each row, index and result (N, K)."""
        bias = self._head.bias
        picked = self._head.classes(index, self._head.dtype).to(self._wide)
        wide = e.to(self._head.dtype).to(self._wide)
        if self._options.batch_invariant:  # the order of a batched product's sums may follow the batch
            z = (picked * wide[:, None]).sum(-1)
        else:
            z = torch.bmm(picked, wide[:, :, None]).squeeze(2)
        z = z if bias is None else z + bias.to(self._wide)[index]
        cap = self._options.softcap
        return z if cap is None else cap * (z / cap).tanh()


def masked(value: Tensor, ignored: Tensor) -> Tensor:
    """Return a statistic (N,) or (N, K) with 0 in ignored rows, or −1 where it is a class."""
    mask = ignored if value.dim() == 1 else ignored[:, None]
    return value.masked_fill(mask, 0 if value.is_floating_point() else -1)


def _key(temperature: float | Tensor, classes: Tensor | None) -> tuple[object, object]:
    """Return what tells one softmax from another."""
    return id(temperature) if isinstance(temperature, Tensor) else temperature, id(classes)


def _there(value: _T | None) -> _T:
    if value is None:
        raise RuntimeError("a statistic that was asked for is missing")
    return value
