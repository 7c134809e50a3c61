"""Statistics of rows of logits, differentiable, without the logits.

Most losses touch a row of logits only through a few numbers. A loss is then ordinary autograd on vectors of
N numbers, and its gradient needs only one coefficient per row and statistic. The same statistics of dense
logits (:func:`row_statistics`) are for small classifiers, and are what the others are tested against.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lossworks.errors import UserError
from lossworks.head.core.arguments import (
    Implementation,
    Options,
    check_parallel,
    check_targets,
    operands,
    require_tensors,
    usable_impl,
)
from lossworks.head.core.dense_reference import dense_logits, scaled_logits, whole_classifier
from lossworks.head.core.divergences import parts
from lossworks.head.core.low_rank import LowRankClassifier, taken_apart
from lossworks.head.core.valid_rows import blanked, check_range
from lossworks.head.core.vocab_parallel import VocabParallel
from lossworks.head.shared_passes import SharedPasses, masked
from lossworks.head.statistics import (
    Divergence,
    ExpectedLogit,
    Gathered,
    LogSumExp,
    Mean,
    Predicted,
    Statistic,
    StatisticName,
    SumOfSquares,
    Target,
    TeacherExpectedLogit,
    TopKDivergence,
    Variance,
    named,
)


def linear_row_statistics(
    e: Tensor,
    c: Tensor | LowRankClassifier,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    statistics: Sequence[Statistic | StatisticName] = ("target", "logsumexp"),
    ignore_index: int = -100,
    softcap: float | None = None,
    target_offset: Tensor | None = None,
    impl: Implementation = "auto",
    vocab_parallel: VocabParallel | dist.ProcessGroup | None = None,
    buffer_share: float = 0.05,
    batch_invariant: bool = False,
) -> tuple[Tensor, ...]:
    r"""Return statistics of the rows of ``z = E·Cᵀ + b`` without building z, differentiable in E, C and b.

    Statistics that share a softmax (one temperature, one set of classes) share one pass over C, forward and
    backward; each further softmax costs a pass of its own.

    Args:
        e: E, shape (..., D).
        c: C, shape (V, D), or a :class:`LowRankClassifier`.
        targets: y in [0, V) or ``ignore_index``, int64, shape (...).
        bias: b, shape (V,), or None.
        statistics: Which; names stand for the defaults of the classes of :mod:`lossworks.head.statistics`.
        ignore_index: Target of rows whose statistics are 0 (predicted classes −1), without a gradient.
        softcap: Cap s of the logits' magnitude, or None.
        target_offset: Added to :math:`z_{i,y_i}` before anything else is taken: a margin; shape (...),
            differentiable, or None.
        impl: As for :func:`lossworks.linear_cross_entropy`.
        vocab_parallel: As there; a teacher's classes are spread over the ranks like the student's.
        buffer_share: As there.
        batch_invariant: As there; not with a teacher.

    Returns:
        One tensor a statistic, in order, float32 at least (predicted classes int64); (N,) reshaped to the
        targets' shape, gathered logits (..., K).

    Raises:
        UserError: Something does not fit together.

    Example:
        >>> e, c, y = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])
        >>> target, lse = linear_row_statistics(e, c, y)
        >>> [round(value, 4) for value in (lse - target).tolist()]  # ln 5
        [1.6094, 1.6094]
    """
    e, c, frozen = taken_apart(e, c)
    require_tensors(e=e, c=c, targets=targets, bias=bias, target_offset=target_offset)
    impl = usable_impl(impl, e, c, targets, bias, target_offset)
    options = Options(
        softcap, ignore_index, impl=impl, buffer_share=buffer_share, batch_invariant=batch_invariant
    )
    head = operands(e, c, bias, vocab_parallel, frozen)
    check_parallel(head.group, impl)
    check_targets(e, targets, len(head.c), soft=False)
    if target_offset is not None and target_offset.shape != targets.shape:
        raise UserError(f"target_offset {tuple(target_offset.shape)} must be {tuple(targets.shape)}")
    chosen = named(statistics)
    offset = None if target_offset is None else target_offset.reshape(-1)
    if impl == "reference":
        flat = targets.reshape(-1)
        logits = dense_logits(
            blanked(head.e, flat == ignore_index), whole_classifier(head), head.bias, softcap
        )
        found = list(row_statistics(logits, flat, chosen, ignore_index=ignore_index, target_offset=offset))
    else:
        if head.group is None:
            check_range(targets.reshape(-1), classes=len(head.c), ignore_index=ignore_index)
        found = SharedPasses(head, options, targets.reshape(-1), offset, chosen).all()
    return tuple(value.reshape(*targets.shape, *value.shape[1:]) for value in found)


def row_statistics(
    logits: Tensor,
    targets: Tensor,
    statistics: Sequence[Statistic | StatisticName] = ("target", "logsumexp"),
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
    z = logits = blanked(logits, ignored)
    if target_offset is not None:
        z = z.scatter_add(1, index, target_offset.to(z.dtype)[:, None])
    return tuple(masked(_dense(one, z, logits, index), ignored) for one in named(statistics))


def _teacher(statistic: TeacherExpectedLogit | Divergence) -> Tensor:
    """Return a teacher's logits over its temperature, of the classes that both have, without a gradient."""
    logits = dense_logits(statistic.e.flatten(0, -2), statistic.c, statistic.bias, statistic.softcap)
    return logits.detach()[:, : statistic.classes] / statistic.temperature


def _dense(  # noqa: C901, PLR0911 - one case a statistic
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
            q = _teacher(statistic).softmax(1)
            return (q * z[:, : q.shape[1]]).sum(1)
        case Divergence(kind):
            log_q = _teacher(statistic).log_softmax(1)
            own = z[:, : log_q.shape[1]] / statistic.temperature
            return parts(kind, own.log_softmax(1), log_q, statistic.weight).sum(1)
        case TopKDivergence(classes=classes):
            log_p = (without_offset / statistic.temperature).log_softmax(1)
            return statistic.of(log_p.gather(1, classes.reshape(len(z), classes.shape[-1])))
        case Gathered(classes):
            return without_offset.gather(1, classes.reshape(len(z), classes.shape[-1]))
        case Predicted():
            return without_offset.argmax(1)
