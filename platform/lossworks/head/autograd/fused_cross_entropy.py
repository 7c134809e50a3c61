"""The operator of cross-entropy summed over rows, with its gradients made in the same pass.

``torch.compile(fullgraph=True)`` sees each operator as one node, and so do tensors without values; eager code
calls what is inside. There
everything happens that depends on the data: targets are checked, and ignored rows dropped. The autograd
functions decide what is kept for the backward pass; the gradient of a gradient is refused, not silently
wrong.
"""

from typing import Any

import torch
from torch import Tensor

from lossworks.adapters.torch_private import without_values
from lossworks.head import backends
from lossworks.head.autograd.once_differentiable import once_differentiable
from lossworks.head.core.low_rank import frozen_of
from lossworks.head.core.problem import Filter, Softmax
from lossworks.head.core.row_formulas import CrossEntropyFormula
from lossworks.head.core.valid_rows import ValidRows, stored
from lossworks.head.cpu.backend import Pass


def fuse(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    probabilities: Tensor | None,
    mass: Tensor | None,
    nll_weight: Tensor,
    lse_weight: Tensor | None,
    total_weight: Tensor | None,
    square_weight: Tensor | None,
    class_weight: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    eps: float | None,
    repair: bool,
    share: float,
    dtype: torch.dtype,
    wanted: list[bool],
    impl: str,
    accumulate: str,
    group: str | None,
    reduce_e: bool,
    predicted: bool,
    frozen: Tensor | None,
    frozen_scale: Tensor | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the summed loss, gradients of E, C and the bias, the mass left out and the predicted classes.

    Arguments are the fields of :class:`LinearProblem`, :class:`CrossEntropyFormula` and :class:`Pass`, whose
    docstrings give their shapes. The results are of no dimension, (N, D), (V, D), (V,), (N,) and (N,), int64;
    what is not wanted, and the mass where nothing is filtered, are empty.
    """
    rows = ValidRows(
        e,
        c,
        targets,
        bias,
        softcap,
        ignore_index,
        group,
        None,
        probabilities,
        frozen_of(frozen, frozen_scale),
    )
    rule = CrossEntropyFormula(
        rows.keep(nll_weight),
        rows.keep(lse_weight),
        rows.keep(total_weight),
        rows.keep(square_weight),
        rows.keep(mass),
        class_weight,
        temperature,
    )
    how = Pass(
        dtype,
        Softmax(temperature),
        totals=total_weight is not None,
        predicted=predicted,
        weights=class_weight,
        filtering=None if eps is None else Filter(eps, repair),
        share=share,
        plan_classes=rows.plan_classes,
        accumulate=accumulate,
        wide_results=torch.float16 in (e.dtype, c.dtype),
        batch_invariant=batch_invariant,
    )
    with torch.autocast(e.device.type, enabled=False):
        backend = backends.get(impl, rows.problem)
        result = backend.fused(rows.problem, how, rule, (wanted[0], wanted[1], wanted[2]), rows.combine)
        gradients = rows.gradients(result.gradients, reduce_e=reduce_e, wide=True)
    mass = result.mass
    if eps is not None and mass is None:  # no gradient, of which nothing is left out
        mass = torch.zeros_like(result.losses)
    best = rows.predicted(result.sums.predicted)
    return result.losses.sum(), *gradients, rows.total_mass(mass), best


fused_cross_entropy = torch.library.custom_op("lossworks::linear_cross_entropy", fuse, mutates_args=())


@fused_cross_entropy.register_fake
def _(
    e: Tensor, c: Tensor, _: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    eps, wanted, predicted = rest[10], rest[14], rest[19]
    wide = torch.promote_types(e.dtype, torch.float32)
    mass = e.new_empty(0 if eps is None else e.shape[0], dtype=wide)
    best = e.new_empty(e.shape[0] if predicted else 0, dtype=torch.int64)
    return e.new_empty((), dtype=wide), *empty_gradients(e, c, bias, wanted, wide=True), mass, best


def empty_gradients(
    e: Tensor, c: Tensor, bias: Tensor | None, wanted: list[bool], *, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the gradients of E (N, D), C (V, D) and the bias (V,); empty where not wanted."""

    def room(x: Tensor | None, asked: bool) -> Tensor:
        if x is None or not asked:
            return e.new_empty(0)
        return x.new_empty(x.shape, dtype=stored(x.dtype) if wide else x.dtype)

    return room(e, wanted[0]), room(c, wanted[1]), room(bias, wanted[2])


class FusedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy, with gradients made in the forward pass and handed over in the backward.

    The first backward pass gives the stored gradients away, scaled in place: a copy of ∂C would be as large
    as C. A second one through a retained graph computes them again. (Compiled graphs keep and copy.)
    """

    @staticmethod
    def forward(
        ctx: Any, e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum, a scalar, the mass left out and the predicted class of each row, (N,) or empty."""
        ctx.compiled = without_values(e, c, targets)
        call = fused_cross_entropy if ctx.compiled else fuse
        loss, *gradients, mass, predicted = call(e, c, targets, bias, *rest)
        ctx.dtypes = [e.dtype, c.dtype, e.dtype if bias is None else bias.dtype]
        if ctx.compiled:
            ctx.save_for_backward(*gradients)
        else:
            ctx.gradients = gradients
            ctx.plain = [None if isinstance(value, Tensor) else value for value in rest]
            ctx.save_for_backward(e, c, bias, targets, *(x if isinstance(x, Tensor) else None for x in rest))
        ctx.mark_non_differentiable(mass, predicted)
        return loss, mass, predicted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of E (N, D), C (V, D) and the bias (V,) for that of the sum, a scalar."""
        if ctx.compiled:
            scaled = [value * g.to(value.dtype) for value in ctx.saved_tensors]
        else:
            gradients, ctx.gradients = ctx.gradients, None
            scaled = _fused_again(ctx) if gradients is None else gradients
            if bool(g != 1):
                scaled = [value.mul_(g) for value in scaled]
        wanted = [
            value.to(dtype) if need else None
            for value, dtype, need in zip(scaled, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return (*wanted, *(None,) * (len(ctx.needs_input_grad) - 3))


def _fused_again(ctx: Any) -> list[Tensor]:
    e, c, bias, targets, *tensors = ctx.saved_tensors
    rest = [plain if tensor is None else tensor for plain, tensor in zip(ctx.plain, tensors, strict=True)]
    return list(fuse(e, c, targets, bias, *rest)[1:4])
