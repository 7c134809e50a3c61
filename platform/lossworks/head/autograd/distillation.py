"""The expected logit under a teacher's softmax: two linear heads in one pass, and neither's logits."""

from typing import Any

import torch
from torch import Tensor

from lossworks.adapters.torch_private import without_values
from lossworks.head import backends
from lossworks.head.autograd.fused_cross_entropy import empty_gradients
from lossworks.head.autograd.once_differentiable import once_differentiable
from lossworks.head.core.arguments import Operands, Options
from lossworks.head.core.problem import RowSums
from lossworks.head.core.valid_rows import ValidRows


def teacher_expected_logit(
    student: Operands,
    options: Options,
    targets: Tensor,
    teacher: Operands,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """Return Σ_k q_ik z_ik, shape (N,), with q the softmax of the teacher's logits over τ; 0 in ignored rows.

    Where classes are spread over ranks, the teacher's are spread like the student's.

    Args:
        student: Whose logits z are averaged; differentiable.
        options: The student's softcap, the implementation and the buffer.
        targets: Shape (N,), int64; they only say which rows are ignored.
        teacher: Whose softmax q is; not differentiated.
        softcap: Of the teacher's logits, or None.
        temperature: τ of the teacher's softmax.
    """
    result: Tensor = _TeacherExpected.apply(
        *(student.e, student.c, student.bias, targets, teacher.e, teacher.c, teacher.bias),
        options.softcap,
        softcap,
        temperature,
        options.ignore_index,
        options.buffer_share,
        student.dtype,
        options.impl,
        student.group,
        student.reduce_e,
    )[0]
    return result


def average_rows(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher_e: Tensor,
    teacher_c: Tensor,
    teacher_bias: Tensor | None,
    softcap: float | None,
    teacher_softcap: float | None,
    temperature: float,
    ignore_index: int,
    share: float,
    dtype: torch.dtype,
    impl: str,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    """Return the expected logits and the teacher's log Σ exp, over all ranks' classes; both (N,)."""
    rows = ValidRows(e, c, targets, bias, softcap, ignore_index, group)
    theirs = ValidRows(teacher_e, teacher_c, targets, teacher_bias, teacher_softcap, ignore_index, group)
    with torch.autocast(e.device.type, enabled=False):
        expected, lse = backends.get(impl, rows.problem).teacher_expected(
            rows.problem, theirs.problem, temperature, dtype, share
        )
        whole = rows.combine(RowSums(lse, torch.zeros_like(lse), expected.to(lse.dtype)))
    return rows.spread(whole.expected).to(rows.problem.wide), theirs.spread(whole.logsumexp)


linear_teacher_expected = torch.library.custom_op(
    "lossworks::linear_teacher_expected", average_rows, mutates_args=()
)


@linear_teacher_expected.register_fake
def _(e: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    own, theirs = (torch.promote_types(x.dtype, torch.float32) for x in (e, rest[3]))
    return e.new_empty(e.shape[0], dtype=own), e.new_empty(e.shape[0], dtype=theirs)


def slope_averages(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher_e: Tensor,
    teacher_c: Tensor,
    teacher_bias: Tensor | None,
    softcap: float | None,
    teacher_softcap: float | None,
    temperature: float,
    ignore_index: int,
    share: float,
    dtype: torch.dtype,
    impl: str,
    group: str | None,
    reduce_e: bool,
    lse: Tensor,
    upstream: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of E (N, D), C (V, D) and the bias (V,); empty where not wanted."""
    rows = ValidRows(e, c, targets, bias, softcap, ignore_index, group)
    theirs = ValidRows(teacher_e, teacher_c, targets, teacher_bias, teacher_softcap, ignore_index, group)
    with torch.autocast(e.device.type, enabled=False):
        found = backends.get(impl, rows.problem).teacher_gradients(
            rows.problem,
            theirs.problem,
            temperature,
            rows.keep(lse),
            rows.keep(upstream),
            (wanted[0], wanted[1], wanted[2]),
            dtype,
            share,
        )
        return rows.gradients(found, reduce_e=reduce_e)


linear_teacher_gradients = torch.library.custom_op(
    "lossworks::linear_teacher_gradients", slope_averages, mutates_args=()
)


@linear_teacher_gradients.register_fake
def _(e: Tensor, c: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(e, c, bias, rest[-1])


class _TeacherExpected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, softcap, teacher_softcap, temperature, ignore, share, dtype, impl, group, reduce_e = (
            arguments
        )
        ctx.plain = (softcap, teacher_softcap, temperature, ignore, share, dtype, impl, group)
        ctx.reduce_e = reduce_e
        call = linear_teacher_expected if without_values(*tensors) else average_rows
        expected, lse = call(*tensors, *ctx.plain)
        ctx.save_for_backward(*tensors, lse)
        ctx.mark_non_differentiable(lse)
        return expected, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors, lse = ctx.saved_tensors[:-1], ctx.saved_tensors[-1]
        call = linear_teacher_gradients if without_values(*tensors) else slope_averages
        wanted = list(ctx.needs_input_grad[:3])
        arguments = (*tensors, *ctx.plain, ctx.reduce_e, lse, upstream[0], wanted)
        found: tuple[Tensor, ...] = call(*arguments)
        return *(g if need else None for g, need in zip(found, wanted, strict=True)), *(None,) * 13
