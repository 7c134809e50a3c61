"""Any loss of a row's divergence from a teacher, folded into the pass over both heads' logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from lossworks.adapters.torch_private import transformed, without_values
from lossworks.head.autograd.folded_loss import FoldedLoss
from lossworks.head.core.arguments import (
    Implementation,
    Operands,
    check_targets,
    in_full_precision,
    operands,
    require_tensors,
)
from lossworks.head.core.divergences import check_divergence
from lossworks.head.core.row_formulas import differentiated, require_one_a_row
from lossworks.head.core.valid_rows import ValidRows
from lossworks.head.cpu.divergences import DivergenceRule, fused_divergence
from lossworks.head.row_statistics import linear_row_statistics
from lossworks.head.statistics import Divergence, LogSumExp, Target

TaughtFormula = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From target logits, logsumexps and divergences, all (T,), to losses (T,); no row may look at another."""


def linear_teacher_loss(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    teacher: Divergence,
    loss: TaughtFormula | None = None,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    impl: Implementation = "auto",
    buffer_share: float = 0.05,
) -> Tensor:
    r"""Return :math:`\sum_i φ(z_{i,y_i}, \mathrm{lse}_i, D_i)` with its gradient formed in the same pass.

    D is the divergence of the model's softmax from a teacher's. Both heads' logits of a chunk of rows are
    made once and kept, so that loss and gradient take four products, where those of :class:`Divergence`
    among the statistics take six; and a term of cross-entropy, or of any other loss of a label's logit and
    logsumexp, takes none besides. With a softcap, narrow weights or a padded teacher it is those statistics
    that are taken.

    Args:
        e: Embeddings E, shape (..., D).
        c: Classifier C, shape (V, D).
        targets: y in [0, V) or ``ignore_index``, shape (...), int64.
        teacher: The divergence, with the teacher's features and head.
        loss: φ; it gets :math:`z_y`, :math:`τ \log \sum_k \exp(z_k/τ)` and D of some rows, each (T,), and
            returns (T,). None for D itself.
        bias: b, shape (V,), or None.
        ignore_index: Target of rows that are left out.
        softcap: Cap of the model's logits' magnitude, or None.
        temperature: τ > 0 of the logsumexp; the divergence has its own.
        token_weight: Factors of the losses, of any sign, shape (...), without a gradient, or None. Rows that
            weigh 0 are left out, whatever they hold.
        impl: As for :func:`lossworks.linear_row_statistics`.
        buffer_share: Largest work buffer as a share of both heads' logits.

    Returns:
        The sum, a float32 scalar (float64 for float64 inputs).

    Raises:
        UserError: Something does not fit together, or φ returns another shape than (T,).

    Example:
        >>> e, c, y = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])
        >>> teacher = Divergence("forward-kl", torch.zeros(2, 5), torch.zeros(4, 5))
        >>> half = lambda z, lse, d: 0.5 * (lse - z) + 0.5 * d
        >>> round(linear_teacher_loss(e, c, y, teacher, half).item(), 4)  # 2 · ½ ln 4
        1.3863
    """
    require_tensors(e=e, c=c, targets=targets, bias=bias, token_weight=token_weight)
    check_divergence(teacher.kind, teacher.weight)
    head = operands(e, c, bias, None)
    weight = None if token_weight is None else token_weight.detach().reshape(-1)
    if weight is not None:
        targets = targets.masked_fill(weight.reshape(targets.shape) == 0, ignore_index)
    theirs = operands(teacher.e.detach(), teacher.c.detach(), teacher.bias, None)
    looked_at = not (without_values(e, c, targets) or transformed(e, c, targets, bias))
    own = looked_at and softcap is None and impl in ("auto", "cpu")
    if not (own and _may_keep(head, theirs, teacher)):
        found = linear_row_statistics(
            *(e, c, targets, bias),
            statistics=[teacher] if loss is None else [Target(), LogSumExp(temperature), teacher],
            ignore_index=ignore_index,
            softcap=softcap,
            impl=impl,
            buffer_share=buffer_share,
        )
        return _summed(found, targets.reshape(-1) != ignore_index, loss, weight, looked_at=looked_at)
    check_targets(e, targets, len(head.c), soft=False)
    flat, grad = targets.reshape(-1), torch.is_grad_enabled()
    of_e, of_c, of_bias = (grad and x is not None and x.requires_grad for x in (head.e, head.c, head.bias))
    wanted = (of_e, of_c, of_bias)

    def total(e: Tensor, c: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        rows = ValidRows(e, c, flat, bias, None, ignore_index, None)
        others = ValidRows(theirs.e, theirs.c, flat, theirs.bias, teacher.softcap, ignore_index, None)
        formula = differentiated(
            loss or _divergence_alone, temperature, rows.keep(weight), slopes=any(wanted)
        )
        with in_full_precision(e.device):
            losses, gradients = fused_divergence(
                rows.problem,
                others.problem,
                DivergenceRule(teacher.kind, teacher.weight, float(teacher.temperature)),
                teacher.temperature if loss is None else temperature,
                formula,
                wanted,
                head.dtype,
                buffer_share,
            )
            return losses.sum(), rows.gradients(gradients, reduce_e=False, wide=True)

    result: Tensor = FoldedLoss.apply(head.e, head.c, head.bias, total)
    return result


def _may_keep(head: Operands, theirs: Operands, teacher: Divergence) -> bool:
    """Return whether logits may be kept; heads that don't fit each other are refused where they are not."""
    fits = len(theirs.e) == len(head.e) and len(theirs.c) == len(head.c) and teacher.temperature > 0
    wide = head.c.dtype == torch.promote_types(head.e.dtype, torch.float32)
    return fits and wide and head.group is None and teacher.classes is None


def _divergence_alone(target: Tensor, lse: Tensor, divergence: Tensor) -> Tensor:  # noqa: ARG001
    return divergence


def _summed(
    found: tuple[Tensor, ...],
    valid: Tensor,
    loss: TaughtFormula | None,
    weight: Tensor | None,
    *,
    looked_at: bool,
) -> Tensor:
    """Return the sum of losses of statistics, where ``valid`` (N,); φ sees those rows alone if it can."""
    columns = [column.reshape(-1) for column in found]
    if looked_at:
        rows = valid.nonzero().squeeze(1)
        columns, weight = [x[rows] for x in columns], None if weight is None else weight[rows]
    elif loss is not None:
        # At a target of 0 and a logsumexp of 0, as if it were sure, φ may have no finite gradient.
        columns[0] = torch.where(valid, columns[0], -1.0)
    values = columns[0] if loss is None else loss(*columns)
    require_one_a_row(values, columns[0])
    values = values if looked_at else torch.where(valid, values, 0)
    return (values if weight is None else values * weight).sum()
