"""The operators of divergences of two heads' softmaxes; see :mod:`.fused_cross_entropy`."""

from typing import Any

import torch
from torch import Tensor

from lossworks.adapters.torch_private import without_values
from lossworks.head.autograd.fused_cross_entropy import empty_gradients
from lossworks.head.autograd.once_differentiable import once_differentiable
from lossworks.head.core.arguments import Operands, Options, in_full_precision
from lossworks.head.core.valid_rows import ValidRows
from lossworks.head.cpu.divergences import (
    DivergenceRule,
    DivergenceSums,
    divergence_gradients,
    divergence_sums,
)


def divergence(
    student: Operands,
    options: Options,
    targets: Tensor,
    teacher: Operands,
    softcap: float | None,
    rule: DivergenceRule,
) -> Tensor:
    """Return the divergence of every row, shape (N,), 0 in ignored rows; differentiable in the student.

    Args:
        student: Whose softmax p is.
        options: The student's softcap, and the buffer.
        targets: Shape (N,), int64; they only say which rows are ignored.
        teacher: Whose softmax q is, with as many classes, spread over ranks like the student's.
        softcap: Of the teacher's logits, or None.
        rule: Which divergence.
    """
    result: Tensor = _Divergence.apply(
        *(student.e, student.c, student.bias, targets, teacher.e, teacher.c, teacher.bias),
        *(options.softcap, softcap, *rule, options.ignore_index, options.buffer_share, student.dtype),
        student.group,
        student.reduce_e,
    )[0]
    return result


def diverge_rows(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher_e: Tensor,
    teacher_c: Tensor,
    teacher_bias: Tensor | None,
    softcap: float | None,
    teacher_softcap: float | None,
    kind: str,
    weight: float,
    temperature: float,
    ignore_index: int,
    share: float,
    dtype: torch.dtype,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of :class:`DivergenceSums` over all ranks' classes, each (N,), 0 in ignored rows."""
    rows = ValidRows(e, c, targets, bias, softcap, ignore_index, group)
    theirs = ValidRows(teacher_e, teacher_c, targets, teacher_bias, teacher_softcap, ignore_index, group)
    with in_full_precision(e.device):
        sums = divergence_sums(
            rows.problem,
            theirs.problem,
            DivergenceRule(kind, weight, temperature),
            dtype,
            share,
            rows.plan_classes,
            rows.combine,
        )
    values, slopes = rows.over_ranks(sums.values), rows.over_ranks(sums.slopes)
    return (
        rows.spread(values),
        rows.spread(slopes),
        rows.spread(sums.student_lse),
        rows.spread(sums.teacher_lse),
    )


linear_divergence = torch.library.custom_op("lossworks::linear_divergence", diverge_rows, mutates_args=())


@linear_divergence.register_fake
def _(e: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(e.dtype, torch.float32)
    theirs = torch.promote_types(rest[3].dtype, torch.float32)
    return tuple(e.new_empty(e.shape[0], dtype=of) for of in (dtype, dtype, dtype, theirs))


def slope_divergences(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher_e: Tensor,
    teacher_c: Tensor,
    teacher_bias: Tensor | None,
    softcap: float | None,
    teacher_softcap: float | None,
    kind: str,
    weight: float,
    temperature: float,
    ignore_index: int,
    share: float,
    dtype: torch.dtype,
    group: str | None,
    reduce_e: bool,
    sums: list[Tensor],
    upstream: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of E (N, D), C (V, D) and the bias (V,); empty where not wanted."""
    rows = ValidRows(e, c, targets, bias, softcap, ignore_index, group)
    theirs = ValidRows(teacher_e, teacher_c, targets, teacher_bias, teacher_softcap, ignore_index, group)
    with in_full_precision(e.device):
        found = divergence_gradients(
            rows.problem,
            theirs.problem,
            DivergenceRule(kind, weight, temperature),
            DivergenceSums(*map(rows.keep, sums)),
            rows.keep(upstream),
            (wanted[0], wanted[1], wanted[2]),
            dtype,
            share,
        )
        return rows.gradients(found, reduce_e=reduce_e)


linear_divergence_gradients = torch.library.custom_op(
    "lossworks::linear_divergence_gradients", slope_divergences, mutates_args=()
)


@linear_divergence_gradients.register_fake
def _(e: Tensor, c: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(e, c, bias, rest[-1])


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, ctx.plain, ctx.reduce_e = arguments[:7], arguments[7:-1], arguments[-1]
        call = linear_divergence if without_values(*tensors) else diverge_rows
        sums: tuple[Tensor, ...] = call(*tensors, *ctx.plain)
        ctx.save_for_backward(*tensors, *sums)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors, sums = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        call = linear_divergence_gradients if without_values(*tensors) else slope_divergences
        wanted = list(ctx.needs_input_grad[:3])
        arguments = (*tensors, *ctx.plain, ctx.reduce_e, list(sums), upstream[0], wanted)
        found: tuple[Tensor, ...] = call(*arguments)
        gradients = (g if need else None for g, need in zip(found, wanted, strict=True))
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - 3)
