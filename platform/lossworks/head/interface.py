"""The one public function; it checks, dispatches and reduces."""

from typing import Literal

import torch
from torch import Tensor

from lossworks.errors import UserError
from lossworks.head.chunked import ChunkedCrossEntropy
from lossworks.head.reference import reference_losses

Reduction = Literal["mean", "sum", "none"]
Implementation = Literal["auto", "cpu", "reference"]


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    shift: int = 0,
    impl: Implementation = "auto",
) -> Tensor:
    r"""Return the cross-entropy of the linear classifier ``E·Cᵀ + b`` without building its logits.

    With :math:`z_{ik} = C_k \cdot e_i + b_k` (then :math:`z ← s·\tanh(z/s)` if a softcap s is set),

    .. math:: \ell_i = \log \sum_k \exp z_{ik} - z_{i,y_i}.

    The exact path works on chunks of rows and forms the gradient in the same pass, in three matrix products
    and one buffer of chunk × V (Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*,
    ICLR 2025, sections 3 and 4, describe the same loss for GPUs, with tiles and recomputation). With
    ``reduction="none"`` the backward pass recomputes the logits, a fourth product, because the weight of a
    row in ∂C is known only then. Under ``torch.autocast`` the products run in its dtype; the softmax and
    the accumulation of ∂C are in float32 at least.

    Args:
        e: Embeddings E, shape (..., D), floating point.
        c: Classifier C, shape (V, D), same dtype as ``e`` (any, under autocast).
        targets: Class indices y in [0, V) or ``ignore_index``, shape (...), int64.
        bias: b, shape (V,), or None.
        ignore_index: Target of rows that count for nothing.
        softcap: Cap s > 0 of the logits' magnitude, or None.
        reduction: ``"mean"`` over rows that are not ignored (0 when there is none), ``"sum"`` or ``"none"``.
        shift: Row t is paired with target t + shift along the last axis of ``targets``; 0 ≤ shift < its size.
        impl: ``"cpu"`` is the exact chunked path in plain torch (it runs on other devices too),
            ``"reference"`` builds the logits, ``"auto"`` chooses the best that there is.

    Returns:
        A float32 scalar (float64 for float64 inputs), or with ``reduction="none"`` the losses, shape (...)
        with ``shift`` entries cut off the last axis; 0 in ignored rows.

    Raises:
        UserError: Shapes, dtypes or options do not fit together, or a target is out of range.

    Example:
        >>> e, c, y = torch.zeros(3, 4), torch.zeros(8, 4), torch.tensor([0, 1, -100])
        >>> round(linear_cross_entropy(e, c, y).item(), 4)  # ln 8
        2.0794
    """
    _check_options(softcap=softcap, reduction=reduction, impl=impl)
    _check_tensors(e, c, targets, bias)
    if shift:
        e, targets = _shifted(e, targets, shift)
    shape = targets.shape
    rows = e.reshape(-1, e.shape[-1])
    flat_targets = targets.reshape(-1)
    _check_range(flat_targets, classes=c.shape[0], ignore_index=ignore_index)
    if impl == "reference":
        losses = reference_losses(rows, c, flat_targets, bias, ignore_index=ignore_index, softcap=softcap)
        total = losses.sum()
    else:
        per_row = reduction == "none"
        result = _chunked(rows, c, flat_targets, bias, ignore_index, softcap, per_row)
        losses = total = result
    if reduction == "none":
        return losses.reshape(shape)
    if reduction == "sum":
        return total
    return total / (flat_targets != ignore_index).sum().clamp(min=1)


def _chunked(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    per_row: bool,
) -> Tensor:
    """Drop ignored rows, run the chunked path in autocast's dtype, and put the rows back."""
    device = e.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else e.dtype
    valid = (targets != ignore_index).nonzero().squeeze(1)
    complete = valid.numel() == targets.numel()
    kept_e, kept_targets = (e, targets) if complete else (e[valid], targets[valid])
    with torch.autocast(device, enabled=False):
        result = ChunkedCrossEntropy.apply(
            kept_e, c, bias, kept_targets, softcap, per_row, dtype, torch.is_grad_enabled()
        )
    if complete or not per_row:
        return result
    return result.new_zeros(targets.shape).index_copy(0, valid, result)


def _shifted(e: Tensor, targets: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    if targets.dim() == 0 or not 0 <= shift < targets.shape[-1]:
        size = targets.shape[-1] if targets.dim() else 0
        raise UserError(f"shift={shift} must be at least 0 and less than the {size} targets of a sequence")
    return e[..., :-shift, :], targets[..., shift:]


def _check_options(*, softcap: float | None, reduction: str, impl: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise UserError(f"reduction={reduction!r} must be mean, sum or none")
    if impl not in ("auto", "cpu", "reference"):
        raise UserError(f"impl={impl!r} must be auto, cpu or reference")
    if softcap is not None and not softcap > 0:
        raise UserError(f"softcap={softcap} must be positive, or None for no cap")


def _check_tensors(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("e", e), ("c", c), ("targets", targets), ("bias", bias)):
        if type(tensor).__name__ == "DTensor":
            raise UserError(f"{name} is a DTensor; gather it first, for instance with {name}.full_tensor()")
    if e.dim() < 1 or c.dim() != 2 or e.shape[-1] != c.shape[1]:
        raise UserError(f"e {tuple(e.shape)} and c {tuple(c.shape)} must be (..., D) and (V, D)")
    if c.shape[0] == 0:
        raise UserError("c has no class: V must be at least 1")
    if targets.shape != e.shape[:-1]:
        raise UserError(f"targets {tuple(targets.shape)} must have e's leading shape {tuple(e.shape[:-1])}")
    if targets.dtype != torch.int64:
        raise UserError(f"targets are {targets.dtype}; they must be torch.int64 class indices")
    if bias is not None and bias.shape != c.shape[:1]:
        raise UserError(f"bias {tuple(bias.shape)} must be ({c.shape[0]},), one number a class")
    if not e.is_floating_point() or not c.is_floating_point():
        raise UserError(f"e is {e.dtype} and c is {c.dtype}; both must be floating point")
    if e.dtype != c.dtype and not torch.is_autocast_enabled(e.device.type):
        raise UserError(f"e is {e.dtype} and c is {c.dtype}; they must agree, or run under torch.autocast")


def _check_range(targets: Tensor, *, classes: int, ignore_index: int) -> None:
    """Refuse targets out of range; on a GPU that would wait for the device, so it is left to the kernel."""
    if targets.device.type != "cpu":
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= classes))
    if bad.any():
        value = int(targets[bad][0])
        raise UserError(
            f"targets hold {value}; a class is in [0, {classes}), and ignored rows hold "
            f"ignore_index={ignore_index}"
        )
