"""The expected logit under a teacher's softmax: two linear heads in one pass, and neither's logits."""

from typing import Any

import torch
from torch import Tensor

from lossworks.head import backends
from lossworks.head.autograd.once_differentiable import once_differentiable
from lossworks.head.core.arguments import Operands, Options
from lossworks.head.core.problem import LinearProblem


def teacher_expected_logit(
    student: Operands, options: Options, teacher: Operands, softcap: float | None, temperature: float
) -> Tensor:
    """Return Σ_k q_ik z_ik, shape (N,), with q the softmax of the teacher's logits over τ.

    Args:
        student: Whose logits z are averaged; differentiable.
        options: The student's softcap, the implementation and the buffer.
        teacher: Whose softmax q is; not differentiated.
        softcap: Of the teacher's logits, or None.
        temperature: τ of the teacher's softmax.
    """
    result: Tensor = _TeacherExpected.apply(
        student.e, student.c, student.bias, student.dtype, options, teacher, softcap, temperature
    )
    return result


class _TeacherExpected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        options: Options,
        teacher: Operands,
        softcap: float | None,
        temperature: float,
    ) -> Tensor:
        nowhere = torch.full((len(e),), -1, device=e.device)
        student = LinearProblem(e, c, nowhere, bias, options.softcap)
        theirs = LinearProblem(teacher.e, teacher.c, nowhere, teacher.bias, softcap)
        backend = backends.get(options.impl, student)
        with torch.autocast(e.device.type, enabled=False):
            expected, lse = backend.teacher_expected(
                student, theirs, temperature, dtype, options.buffer_share
            )
        ctx.save_for_backward(e, c, bias, lse)
        ctx.rest = (theirs, nowhere, temperature, dtype, options, backend)
        return expected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        e, c, bias, lse = ctx.saved_tensors
        teacher, nowhere, temperature, dtype, options, backend = ctx.rest
        student = LinearProblem(e, c, nowhere, bias, options.softcap)
        found = backend.teacher_gradients(
            student,
            teacher,
            temperature,
            lse,
            upstream[0],
            ctx.needs_input_grad[:3],
            dtype,
            options.buffer_share,
        )
        inputs = (e, c, bias)
        cast = [None if g is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True)]
        return *cast, *(None,) * 5
