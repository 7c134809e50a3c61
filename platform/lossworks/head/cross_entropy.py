"""The public function: it checks, brings the weights of the rows together, and reduces."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lossworks.errors import UserError
from lossworks.head.autograd.differentiable_row_sums import differentiable_row_sums
from lossworks.head.core.arguments import (
    Implementation,
    Operands,
    Options,
    Reduction,
    check_choice,
    check_finite,
    check_number,
    check_parallel,
    check_targets,
    operands,
    require_tensors,
    shifted,
    usable_impl,
)
from lossworks.head.core.dense_reference import reference_sums
from lossworks.head.core.low_rank import LowRankClassifier, taken_apart
from lossworks.head.core.problem import RowSums
from lossworks.head.core.row_formulas import CrossEntropyFormula, negative_log_likelihood_with_gradient
from lossworks.head.core.row_weights import split_targets, weighted_rows
from lossworks.head.core.vocab_parallel import VocabParallel


def linear_cross_entropy(
    e: Tensor,
    c: Tensor | LowRankClassifier,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    shift: int = 0,
    return_lse: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    filter_eps: float | Literal["auto"] | None = "auto",
    filter_repair: bool = True,
    accumulate: Literal["fp32", "input"] = "fp32",
    impl: Implementation = "auto",
    vocab_parallel: VocabParallel | dist.ProcessGroup | None = None,
    buffer_share: float = 0.05,
    check: bool = False,
    return_mass: bool = False,
    return_predicted: bool = False,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    r"""Return the cross-entropy of the linear classifier ``E·Cᵀ + b`` without building its logits.

    With :math:`z_{ik} = C_k \cdot e_i + b_k`, then :math:`s\tanh(z/s)` if there is a softcap s, and
    :math:`u = z/τ`, :math:`\mathrm{lse}_i = \log \sum_k \exp u_{ik}`, the loss of a row is

    .. math:: \ell_i = r_i \Bigl[ (1-α)\, w_{y_i} (\mathrm{lse}_i - u_{i,y_i})
              + \tfrac{α}{V} \sum_k w_k (\mathrm{lse}_i - u_{ik}) + λ\, \mathrm{lse}_i^2 \Bigr]

    (Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*, ICLR 2025, sections 3 and 4, for
    the loss; smoothing with class weights as in :func:`torch.nn.functional.cross_entropy`; the log-Z term of
    Wortsman et al., *Small-scale proxies for large-scale Transformer training instabilities*, 2023).

    The gradient of ``"mean"`` and ``"sum"`` is formed in the forward pass, in three matrix products, from a
    buffer of some rows × V. With ``"none"`` or ``return_lse`` the weight of a row is known in the backward
    pass only, so the logits are made twice: four products. Evaluation is one.

    Args:
        e: Embeddings E, shape (..., D), floating point; any strides.
        c: Classifier C, shape (V, D), same dtype as ``e`` (any, under autocast). A DTensor placed as
            ``Shard(0)`` is vocabulary-parallel by itself. Or a :class:`LowRankClassifier`, frozen but for a
            part of low rank.
        targets: Class indices y in [0, V) or ``ignore_index``, shape (...), int64; or soft targets
            :math:`q_{ik}`, shape (..., V), floating point, which stand for :math:`\sum_k q_{ik} (…)` and have
            no gradient.
        bias: b, shape (V,), or None.
        ignore_index: Target of rows that count for nothing, and cost nothing.
        softcap: Cap s > 0 of the logits' magnitude, or None.
        reduction: ``"sum"``, ``"none"``, or ``"mean"``: the sum divided by :math:`\sum_i r_i w_{y_i}` over
            rows that are not ignored; 0 where that is 0.
        shift: Row t is paired with target t + shift along the last axis of ``targets``; 0 ≤ shift < its size.
        return_lse: Also return the logsumexps, shaped like the losses, 0 in ignored rows, differentiable.
        label_smoothing: α in [0, 1].
        class_weight: w, shape (V,), of any sign. No gradient.
        token_weight: r, of any sign, such as advantages, shaped like ``targets`` (before the shift it belongs
            to the row). Rows that weigh 0 are ignored, whatever they hold. No gradient.
        z_loss: λ ≥ 0.
        temperature: τ > 0.
        filter_eps: Leave probabilities below it out of the gradient's products, where that saves time; None
            is exact, and so is ``"auto"``: on the hidden states of small language models no threshold was
            found that keeps the gradient of rare classes (docs/filtering.md). The loss itself is always
            exact. The error of ∂e_i is at most :math:`g_i m_i \max_k \|C_k - \bar c\|` with the upstream
            gradient :math:`g_i`, the probability :math:`m_i` left out (``return_mass``) and the mean
            :math:`\bar c` of what is left out; see :mod:`lossworks.head.core.filtering`.
        filter_repair: Put the rank-one matrix with the same sums in place of what is left out; without it the
            filter is the published one.
        accumulate: ``"input"`` lets Triton add up ∂E and ∂C in the inputs' dtype, which costs accuracy
            (the CPU path always adds up in float32 or wider).
        impl: ``"cpu"`` is plain torch (on any device), ``"triton"`` the GPU's kernels, ``"reference"`` builds
            the logits, ``"auto"`` chooses; inside transforms of ``torch.func``, such as gradients of single
            examples, the logits.
        vocab_parallel: A process group over whose ranks the rows of ``c`` are spread, in order, or a
            :class:`VocabParallel` that names more; all ranks pass the same E and targets. Not with class
            weights or soft targets.
        buffer_share: Largest work buffer as a share of the logits' N·V numbers (64 MiB are always allowed
            from 0.05 on). If it holds less than 128 rows, the logits are made twice, a fourth product and
            next to no buffer; or, for float32 and N ≤ D, they are kept where ∂C is written afterwards.
        check: Refuse NaN and infinities in E, C and the bias by the row that holds them; otherwise they
            propagate as they do through plain torch.
        return_mass: Also return the probability that the filter left out of each row, shaped like the
            losses, 0 without a filter; for ``"mean"`` and ``"sum"``.
        return_predicted: Also return the most likely class of each row, from the same pass, int64, shaped
            like the losses, −1 in ignored rows; which of equally likely ones is not defined. The accuracy is
            then ``(predicted == targets).sum() / (predicted >= 0).sum()``.
        batch_invariant: Give a row's loss, its other numbers and its part of ∂E the same bits alone, in any
            batch and at any place (∂E of ``"sum"`` and ``"none"``, since a mean's divisor is the batch's).
            Evaluations that are compared need it, and policies whose log-probabilities are taken twice. It
            costs a fourth product, and a row alone as much as 96. It holds on one machine at one number of
            threads and of vocabulary-parallel ranks, and can't be combined with a filter.

    Returns:
        A float32 scalar (float64 for float64 inputs), or with ``reduction="none"`` the losses, shape (...)
        with ``shift`` entries cut off the last axis, 0 in ignored rows. A tuple, if more is asked for:
        the loss, then logsumexps, mass and predicted classes, as far as they are.

    Raises:
        UserError: Shapes, dtypes, devices or options do not fit together, or a target is out of range.

    Example:
        >>> e, c, y = torch.zeros(3, 4), torch.zeros(8, 4), torch.tensor([0, 1, -100])
        >>> round(linear_cross_entropy(e, c, y).item(), 4)  # ln 8
        2.0794
    """
    e, c, frozen = taken_apart(e, c)
    require_tensors(
        e=e, c=c, targets=targets, bias=bias, class_weight=class_weight, token_weight=token_weight
    )
    impl = usable_impl(impl, e, c, targets, bias, class_weight, token_weight)
    options = Options(
        *(softcap, ignore_index, temperature, filter_eps, filter_repair, accumulate, impl, buffer_share),
        batch_invariant=batch_invariant,
    )
    soft = targets.is_floating_point()
    head = operands(e, c, bias, vocab_parallel, frozen)
    check_parallel(head.group, impl)
    _check_combination(reduction, label_smoothing, z_loss, class_weight, head.group, soft=soft)
    check_targets(e, targets, len(head.c), soft=soft)
    if token_weight is not None and token_weight.shape != e.shape[:-1]:
        raise UserError(f"token_weight {tuple(token_weight.shape)} must be {tuple(e.shape[:-1])}, one a row")
    if class_weight is not None and class_weight.shape != head.c.shape[:1]:
        raise UserError(f"class_weight {tuple(class_weight.shape)} must be ({len(head.c)},), one a class")
    if check:
        check_finite(head)
    if shift:
        head, targets, token_weight = _shift(head, e.shape, targets, token_weight, shift, soft=soft)
    shape = targets.shape[:-1] if soft else targets.shape
    flat, probabilities = split_targets(targets, class_weight, ignore_index)
    if token_weight is not None:
        # Whatever a row holds that weighs nothing, NaN included, and it costs nothing.
        flat = flat.masked_fill(token_weight.detach().reshape(-1) == 0, ignore_index)
    rule, scale = weighted_rows(
        head,
        flat,
        probabilities,
        token_weight,
        class_weight,
        smoothing=label_smoothing,
        z_loss=z_loss,
        mean=reduction == "mean",
        options=options,
    )
    if options.impl != "reference" and reduction != "none" and not return_lse:
        total, mass, predicted = _fused(head, options, flat, probabilities, rule, predicted=return_predicted)
        total = total if scale is None else total * scale
        further = []
        if return_mass:
            further.append(total.new_zeros(shape) if options.eps is None else mass.reshape(shape))
        if return_predicted:
            further.append(predicted.reshape(shape))
        return (total, *further) if further else total
    if return_mass:
        raise UserError("return_mass needs reduction mean or sum, no return_lse, and no impl='reference'")
    losses, sums = _per_row(head, options, flat, probabilities, rule, predicted=return_predicted)
    result = losses.reshape(shape) if reduction == "none" else losses.sum()
    result = result if scale is None else result * scale
    asked = ((return_lse, sums.logsumexp), (return_predicted, sums.predicted))
    further = [column.reshape(shape) for wanted, column in asked if wanted and column is not None]
    return (result, *further) if further else result


def _fused(
    head: Operands,
    options: Options,
    targets: Tensor,
    probabilities: Tensor | None,
    rule: CrossEntropyFormula,
    *,
    predicted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sum, and the probability left out and the predicted class of each row, or empty."""
    from lossworks.head.autograd.fused_cross_entropy import FusedCrossEntropy

    e, c, bias, group, reduce_e, dtype, frozen = head
    grad = torch.is_grad_enabled()
    wanted = [grad and x is not None and x.requires_grad for x in (e, c, bias)]
    total, mass, best = FusedCrossEntropy.apply(
        e,
        c,
        bias,
        targets,
        probabilities,
        rule.mass,
        rule.nll_weight,
        rule.lse_weight,
        rule.total_weight,
        rule.square_weight,
        rule.class_weight,
        options.softcap,
        options.temperature,
        options.ignore_index,
        options.eps,
        options.filter_repair,
        options.buffer_share,
        dtype,
        wanted,
        options.impl,
        options.accumulate,
        group,
        reduce_e,
        predicted,
        *(frozen or (None, None)),
        options.batch_invariant,
    )
    return total, mass, best


def _per_row(
    head: Operands,
    options: Options,
    targets: Tensor,
    probabilities: Tensor | None,
    rule: CrossEntropyFormula,
    *,
    predicted: bool,
) -> tuple[Tensor, RowSums]:
    """Return the weighted losses, shape (N,), and the sums that they are made of."""
    totals = rule.total_weight is not None
    if options.impl == "reference":
        sums = reference_sums(head, options, targets, probabilities, rule.class_weight)
    else:
        sums = differentiable_row_sums(
            head,
            options,
            targets,
            probabilities=probabilities,
            totals=totals,
            predicted=predicted,
            weights=rule.class_weight,
        )
    nll = negative_log_likelihood_with_gradient(sums, options.temperature, rule.mass)
    return rule.losses(sums, nll), sums


def _shift(
    head: Operands,
    shape: torch.Size,
    targets: Tensor,
    token_weight: Tensor | None,
    shift: int,
    *,
    soft: bool,
) -> tuple[Operands, Tensor, Tensor | None]:
    """Cut the last rows of each sequence off, and its first targets."""
    if soft:
        raise UserError(f"shift={shift}: soft targets can't be shifted; cut them and e instead")
    if token_weight is not None:
        token_weight = shifted(token_weight, targets, shift)[0]
    e, targets = shifted(head.e.view(shape), targets, shift)
    return head._replace(e=e.reshape(targets.numel(), shape[-1])), targets, token_weight


def _check_combination(
    reduction: str,
    smoothing: float,
    z_loss: float,
    class_weight: Tensor | None,
    group: str | None,
    *,
    soft: bool,
) -> None:
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_number("label_smoothing", smoothing)
    check_number("z_loss", z_loss)
    if not 0 <= smoothing <= 1:
        raise UserError(f"label_smoothing={smoothing} must be in [0, 1]")
    if not 0 <= z_loss < float("inf"):
        raise UserError(f"z_loss={z_loss} must be at least 0")
    if group is not None and (soft or class_weight is not None):
        raise UserError("vocab_parallel can't be combined with class_weight or soft targets")
