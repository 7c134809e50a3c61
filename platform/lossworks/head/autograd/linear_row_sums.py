"""The operators of the sums of every row, and of their gradients; see :mod:`.fused_cross_entropy`."""

from typing import Any

import torch
from torch import Tensor

from lossworks.adapters.torch_private import without_values
from lossworks.head import backends
from lossworks.head.autograd.fused_cross_entropy import empty_gradients
from lossworks.head.autograd.once_differentiable import once_differentiable
from lossworks.head.core.low_rank import frozen_of
from lossworks.head.core.problem import Coefficients, Filter, RowSums, Softmax
from lossworks.head.core.valid_rows import ValidRows
from lossworks.head.cpu.backend import Pass


def sum_rows(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    probabilities: Tensor | None,
    target_offset: Tensor | None,
    temperature: Tensor,
    classes: Tensor | None,
    weights: Tensor | None,
    frozen: Tensor | None,
    frozen_scale: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    expected: bool,
    totals: bool,
    predicted: bool,
    share: float,
    dtype: torch.dtype,
    impl: str,
    group: str | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of :class:`RowSums` but ``largest``, empty where not asked for, 0 in ignored rows.

    Of ignored rows −1 is predicted. The temperature is a tensor of no dimension or (N,).
    """
    fixed = frozen_of(frozen, frozen_scale)
    rows = ValidRows(e, c, targets, bias, softcap, ignore_index, group, target_offset, probabilities, fixed)
    how = Pass(
        dtype,
        Softmax(rows.temperature(temperature), classes),
        expected,
        totals,
        predicted,
        weights,
        share=share,
        plan_classes=rows.plan_classes,
        batch_invariant=batch_invariant,
    )
    with torch.autocast(e.device.type, enabled=False):
        sums = rows.combine(backends.get(impl, rows.problem).row_sums(rows.problem, how))
    maximum, log_total = sums.shifted()
    columns = (sums.logsumexp, sums.target, sums.expected, sums.total, sums.squares, maximum, log_total)
    found = [rows.spread(column) for column in columns]
    return (
        found[0],
        found[1],
        found[2],
        found[3],
        found[4],
        found[5],
        found[6],
        rows.predicted(sums.predicted),
    )


linear_row_sums = torch.library.custom_op("lossworks::linear_row_sums", sum_rows, mutates_args=())


@linear_row_sums.register_fake
def _(e: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    expected, totals, predicted = rest[12:15]
    wide = torch.promote_types(e.dtype, torch.float32)
    there = (True, True, expected, totals, totals, True, True)
    found = tuple(e.new_empty(e.shape[0] if asked else 0, dtype=wide) for asked in there)
    return *found, e.new_empty(e.shape[0] if predicted else 0, dtype=torch.int64)


def slope_rows(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    probabilities: Tensor | None,
    target_offset: Tensor | None,
    temperature: Tensor,
    classes: Tensor | None,
    weights: Tensor | None,
    frozen: Tensor | None,
    frozen_scale: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    share: float,
    dtype: torch.dtype,
    impl: str,
    accumulate: str,
    group: str | None,
    reduce_e: bool,
    eps: float | None,
    repair: bool,
    batch_invariant: bool,
    sums: list[Tensor],
    coefficients: list[Tensor],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of E (N, D), C (V, D) and the bias (V,); empty where not wanted.

    ``sums`` are the fields of :class:`RowSums`; ``coefficients`` are softmax, target, expected, constant and
    linear, all of shape (N,); empty tensors stand for None.
    """
    fixed = frozen_of(frozen, frozen_scale)
    rows = ValidRows(e, c, targets, bias, softcap, ignore_index, group, target_offset, probabilities, fixed)
    how = Pass(
        dtype,
        Softmax(rows.temperature(temperature), classes),
        filtering=None if eps is None else Filter(eps, repair),
        share=share,
        plan_classes=rows.plan_classes,
        accumulate=accumulate,
        batch_invariant=batch_invariant,
    )
    there = [rows.keep(x) if len(x) == len(e) else None for x in (*sums, *coefficients)]
    known = RowSums(*there[: len(sums)])  # type: ignore[arg-type]  # the first two always are
    softmax, target, of_expected, constant, linear = there[len(sums) :]
    parts = Coefficients(softmax, target, of_expected, constant, linear, weights)
    with torch.autocast(e.device.type, enabled=False):
        backend = backends.get(impl, rows.problem)
        gradients, _ = backend.gradients(rows.problem, how, known, parts, (wanted[0], wanted[1], wanted[2]))
        return rows.gradients(gradients, reduce_e=reduce_e)


linear_row_gradients = torch.library.custom_op("lossworks::linear_row_gradients", slope_rows, mutates_args=())


@linear_row_gradients.register_fake
def _(e: Tensor, c: Tensor, _: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(e, c, bias, rest[-1])


class LinearRowSums(torch.autograd.Function):
    """The differentiable sums of every row: logsumexp, target, expected, total, squares, and others without.

    That is maximum and log_total, for differences without cancellation, and the predicted class.
    """

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        target_offset: Tensor | None,
        temperature: Tensor,
        targets: Tensor,
        probabilities: Tensor | None,
        classes: Tensor | None,
        weights: Tensor | None,
        frozen: Tensor | None,
        frozen_scale: Tensor | None,
        softcap: float | None,
        ignore_index: int,
        expected: bool,
        totals: bool,
        predicted: bool,
        share: float,
        dtype: torch.dtype,
        impl: str,
        accumulate: str,
        group: str | None,
        reduce_e: bool,
        eps: float | None,
        repair: bool,
        batch_invariant: bool,
    ) -> tuple[Tensor, ...]:
        """Return the sums, each of shape (N,), or empty where not asked for."""
        tensors = (e, c, targets, bias, probabilities, target_offset, temperature, classes, weights)
        # The temperature's own gradient needs Σ p z.
        expected = expected or temperature.requires_grad
        call: Any = linear_row_sums if without_values(e, c, targets) else sum_rows
        plain = (softcap, ignore_index, expected, totals, predicted, share, dtype, impl, group)
        sums: tuple[Tensor, ...] = call(*tensors, frozen, frozen_scale, *plain, batch_invariant)
        ctx.save_for_backward(*tensors, frozen, frozen_scale, *sums[:7])
        ctx.plain = (softcap, ignore_index, share, dtype, impl, accumulate, group, reduce_e)
        ctx.plain = (*ctx.plain, eps, repair, batch_invariant)
        ctx.mark_non_differentiable(*sums[5:])
        ctx.set_materialize_grads(False)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``forward``'s arguments for those of its sums, each of shape (N,)."""
        tensors, sums = ctx.saved_tensors[:11], ctx.saved_tensors[11:]
        temperature, ignored = tensors[6], tensors[2] == ctx.plain[1]
        lse, target, expected, total, squares = (
            None if g is None or not len(g) else torch.where(ignored, 0, g) for g in upstream[:5]
        )
        coefficients = [
            None if lse is None else lse / temperature,
            target,
            expected,
            total,
            None if squares is None else 2 * squares,
        ]
        empty = sums[0].new_empty(0)
        filled = [empty if x is None else x for x in coefficients]
        need = ctx.needs_input_grad
        call = linear_row_gradients if without_values(*tensors[:3]) else slope_rows
        arguments = (*tensors, *ctx.plain, list(sums), filled, list(need[:3]))
        gradients: tuple[Tensor, ...] = call(*arguments)
        of_e, of_c, of_bias = (x if wanted else None for x, wanted in zip(gradients, need, strict=False))
        of_offset = None
        if need[3]:
            takes_part = _takes_part(tensors[2], tensors[7])
            of_offset = _offset_gradient(sums, filled, temperature, takes_part)
        of_temperature = None
        if need[4] and lse is not None:
            of_temperature = (-lse * sums[2] / temperature.square()).sum_to_size(temperature.shape)
        return of_e, of_c, of_bias, of_offset, of_temperature, *(None,) * 20


def _takes_part(targets: Tensor, classes: Tensor | None) -> Tensor:
    """Return 1 where the target's class is in the softmax, and 0 elsewhere."""
    return torch.ones(()) if classes is None else classes[targets.clamp(0, len(classes) - 1)]


def _offset_gradient(
    sums: tuple[Tensor, ...], coefficients: list[Tensor], temperature: Tensor, takes_part: Tensor
) -> Tensor:
    """Return ∂L/∂offset_i, which is ∂L/∂z of the target's class."""
    lse, z, expected = sums[0], sums[1], sums[2]
    softmax, target, of_expected, constant, linear = coefficients
    p = torch.exp(z / temperature - lse) * takes_part
    gradient = torch.zeros_like(lse)
    if len(softmax):
        gradient = gradient + softmax * p
    if len(of_expected):
        gradient = gradient + of_expected * p * (1 + (z - expected) / temperature)
    for part, factor in ((target, 1), (constant, 1), (linear, z)):
        if len(part):
            gradient = gradient + part * factor
    return gradient
