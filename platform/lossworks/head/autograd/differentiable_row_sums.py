"""The differentiable sums of every row, without the logits, as one call."""

import torch
from torch import Tensor

from lossworks.head.core.arguments import Operands, Options
from lossworks.head.core.problem import RowSums


def differentiable_row_sums(
    head: Operands,
    options: Options,
    targets: Tensor,
    *,
    probabilities: Tensor | None = None,
    target_offset: Tensor | None = None,
    temperature: Tensor | None = None,
    classes: Tensor | None = None,
    expected: bool = False,
    totals: bool = False,
    predicted: bool = False,
    weights: Tensor | None = None,
) -> RowSums:
    """Return the sums of every row, each (N,), 0 in ignored rows.

    Args:
        head: E, C and bias.
        options: What the caller chose; its temperature counts if ``temperature`` is None.
        targets: Shape (N,), int64.
        probabilities: Soft targets, shape (N, V), or None.
        target_offset: Shape (N,), differentiable, or None.
        temperature: τ, of no dimension or (N,), differentiable, or None.
        classes: Which classes take part in the logsumexp, bool (V,), or None for all.
        expected: Whether Σ p z is wanted.
        totals: Whether Σ w z and Σ z² are wanted.
        predicted: Whether the class of the largest logit is wanted; −1 in ignored rows.
        weights: w, shape (V,), or None for 1.
    """
    e, c, bias, group, reduce_e, dtype, frozen = head
    if temperature is None:
        temperature = e.new_tensor(options.temperature, dtype=torch.promote_types(e.dtype, torch.float32))
    from lossworks.head.autograd.linear_row_sums import LinearRowSums

    found = LinearRowSums.apply(
        e,
        c,
        bias,
        target_offset,
        temperature,
        targets,
        probabilities,
        classes,
        weights,
        *(frozen or (None, None)),
        options.softcap,
        options.ignore_index,
        expected,
        totals,
        predicted,
        options.buffer_share,
        dtype,
        options.impl,
        options.accumulate,
        group,
        reduce_e,
        options.eps,
        options.filter_repair,
        options.batch_invariant,
    )
    lse, target, of_p, total, squares, maximum, log_total, best = found
    return RowSums(
        lse,
        target,
        of_p if len(of_p) or not len(e) else None,
        total if totals else None,
        squares if totals else None,
        maximum,
        log_total,
        predicted=best if predicted else None,
    )
