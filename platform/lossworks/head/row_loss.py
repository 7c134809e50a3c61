"""Any loss of a row's own target logit and logsumexp, folded into the pass over the logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from lossworks.adapters.torch_private import transformed, without_values
from lossworks.errors import UserError
from lossworks.head import backends
from lossworks.head.autograd.folded_loss import FoldedLoss
from lossworks.head.core.arguments import (
    Implementation,
    Operands,
    Options,
    check_targets,
    operands,
    require_tensors,
)
from lossworks.head.core.low_rank import LowRankClassifier, taken_apart
from lossworks.head.core.problem import Softmax
from lossworks.head.core.row_formulas import differentiated, require_one_a_row
from lossworks.head.core.valid_rows import ValidRows
from lossworks.head.cpu.backend import Pass
from lossworks.head.row_statistics import linear_row_statistics
from lossworks.head.statistics import LogSumExp, Target

RowFormula = Callable[[Tensor, Tensor], Tensor]
"""From target logits and logsumexps, both (T,), to losses (T,); no row may look at another."""


def linear_row_loss(
    e: Tensor,
    c: Tensor | LowRankClassifier,
    targets: Tensor,
    loss: RowFormula,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    target_offset: Tensor | None = None,
    token_weight: Tensor | None = None,
    impl: Implementation = "auto",
    buffer_share: float = 0.05,
    batch_invariant: bool = False,
) -> Tensor:
    r"""Return :math:`\sum_i φ(z_{i,y_i}, \mathrm{lse}_i)` with its gradient formed in the same pass.

    A focal or generalised cross-entropy loss thus costs the three products of plain cross-entropy; through
    :func:`linear_row_statistics` its gradient would be known in the backward pass only, which costs a fourth.
    φ is differentiated by autograd on vectors of one chunk's rows.

    Args:
        e: Embeddings E, shape (..., D).
        c: Classifier C, shape (V, D), or a :class:`LowRankClassifier`.
        targets: y in [0, V) or ``ignore_index``, shape (...), int64.
        loss: φ; it gets :math:`z_y` and :math:`τ \log \sum_k \exp(z_k/τ)` of some rows, both (T,), and
            returns (T,). It must treat rows alike and apart, as it is called once per chunk.
        bias: b, shape (V,), or None.
        ignore_index: Target of rows that are left out.
        softcap: Cap of the logits' magnitude, or None.
        temperature: τ > 0.
        target_offset: Added to :math:`z_{i,y_i}` before anything else is taken: a margin; shape (...),
            without a gradient, or None.
        token_weight: Factors of the losses, of any sign, shape (...), without a gradient, or None. Rows that
            weigh 0 are left out, whatever they hold.
        impl: ``"auto"``, ``"cpu"`` or ``"triton"``.
        buffer_share: Largest work buffer as a share of the logits.
        batch_invariant: As for :func:`lossworks.linear_cross_entropy`, of ∂E.

    Returns:
        The sum, a float32 scalar (float64 for float64 inputs).

    Raises:
        UserError: Something does not fit together, or φ returns another shape than (T,).

    Example:
        >>> e, c, y = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])
        >>> focal = lambda z, lse: (1 - (z - lse).exp()) ** 2 * (lse - z)
        >>> round(linear_row_loss(e, c, y, focal).item(), 4)  # 2 · (3/4)² · ln 4
        1.5596
    """
    options = Options(
        *(softcap, ignore_index, temperature),
        impl=impl,
        buffer_share=buffer_share,
        batch_invariant=batch_invariant,
    )
    if impl == "reference":
        raise UserError("impl='reference' must be auto, cpu or triton: use linear_row_statistics for it")
    given = c
    e, c, frozen = taken_apart(features := e, c)
    require_tensors(
        e=e, c=c, targets=targets, bias=bias, target_offset=target_offset, token_weight=token_weight
    )
    head = operands(e, c, bias, None, frozen)
    if without_values(e, c, targets) or transformed(e, c, targets, bias):
        return _of_statistics(features, given, targets, loss, bias, options, target_offset, token_weight)
    if head.group is not None:
        raise UserError("c is spread over ranks by classes: use linear_row_statistics for it")
    check_targets(e, targets, len(head.c), soft=False)
    for name, column in (("target_offset", target_offset), ("token_weight", token_weight)):
        if column is not None and column.shape != targets.shape:
            raise UserError(f"{name} {tuple(column.shape)} must be {tuple(targets.shape)}, one a row")
    flat = targets.reshape(-1)
    if token_weight is not None:
        flat = flat.masked_fill(token_weight.detach().reshape(-1) == 0, ignore_index)
    grad = torch.is_grad_enabled()
    of_e, of_c, of_bias = (grad and x is not None and x.requires_grad for x in (head.e, head.c, head.bias))
    wanted = (of_e, of_c, of_bias)
    offset, weight = _column(target_offset), _column(token_weight)
    result: Tensor = FoldedLoss.apply(
        *(head.e, head.c, head.bias),
        lambda e, c, bias: _total(e, c, bias, flat, offset, weight, loss, options, head, wanted),
    )
    return result


def _of_statistics(
    e: Tensor,
    c: Tensor | LowRankClassifier,
    targets: Tensor,
    loss: RowFormula,
    bias: Tensor | None,
    options: Options,
    target_offset: Tensor | None,
    token_weight: Tensor | None,
) -> Tensor:
    """Return the same sum where φ can't be called on numbers: it becomes a part of the graph."""
    ignored = targets == options.ignore_index
    if token_weight is not None:
        ignored = ignored | (token_weight.detach() == 0)
    target, lse = linear_row_statistics(
        *(e, c, targets.masked_fill(ignored, options.ignore_index), bias),
        statistics=[Target(), LogSumExp(options.temperature)],
        ignore_index=options.ignore_index,
        softcap=options.softcap,
        target_offset=None if target_offset is None else target_offset.detach(),
        impl=options.impl,  # type: ignore[arg-type]  # checked by the options
        buffer_share=options.buffer_share,
        batch_invariant=options.batch_invariant,
    )
    # At a target of 0 and a logsumexp of 0, as if it were sure, φ may have no finite gradient.
    values = loss(torch.where(ignored, -1.0, target).reshape(-1), lse.reshape(-1))
    require_one_a_row(values, targets.reshape(-1))
    values = torch.where(ignored.reshape(-1), 0, values)
    return (values if token_weight is None else values * token_weight.detach().reshape(-1)).sum()


def _column(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().reshape(-1)


def _total(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    offset: Tensor | None,
    weight: Tensor | None,
    loss: RowFormula,
    options: Options,
    head: Operands,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the summed loss and its gradients by E, C and the bias, empty where they are not wanted."""
    rows = ValidRows(
        *(e, c, targets, bias, options.softcap, options.ignore_index, None, offset), frozen=head.frozen
    )
    narrow = torch.float16 in (e.dtype, c.dtype)
    how = Pass(
        *(head.dtype, Softmax(options.temperature)),
        share=options.buffer_share,
        wide_results=narrow,
        batch_invariant=options.batch_invariant,
    )
    with torch.autocast(e.device.type, enabled=False):
        backend = backends.get(options.impl, rows.problem)
        rule = differentiated(loss, options.temperature, rows.keep(weight), slopes=any(wanted))
        result = backend.fused(rows.problem, how, rule, wanted)
        gradients = rows.gradients(result.gradients, reduce_e=False, wide=True)
    return result.losses.sum(), gradients
