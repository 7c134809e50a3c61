"""The same numbers in plain torch with all the logits: the ground truth of the tests, for any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.head.core.arguments import Operands, Options
from lossworks.head.core.problem import RowSums
from lossworks.head.core.valid_rows import blanked, check_range


def dense_logits(e: Tensor, c: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Return the logits, float32 or wider, shape (N, V)."""
    logits = F.linear(e, c, bias)
    # bfloat16 has eight bits: a loss of 7 would come in steps of 0.03.
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def whole_classifier(head: Operands) -> Tensor:
    """Return C (V, D) with its frozen columns."""
    return head.c if head.frozen is None else head.classes(slice(None), head.c.dtype)


def scaled_logits(z: Tensor, temperature: float | Tensor, classes: Tensor | None = None) -> Tensor:
    """Return z/τ of logits (N, V), τ one number or (N,), with −inf in ``classes`` (V,) that are False."""
    u = z / (temperature[:, None] if isinstance(temperature, Tensor) and temperature.dim() else temperature)
    return u if classes is None else u.masked_fill(~classes, float("-inf"))


def reference_sums(
    head: Operands, options: Options, targets: Tensor, probabilities: Tensor | None, weights: Tensor | None
) -> RowSums:
    """Return logsumexp, target, total and predicted class of every row, 0 and −1 in ignored ones.

    Args:
        head: E, C and bias.
        options: Softcap, temperature and the index of ignored rows.
        targets: Shape (N,), int64.
        probabilities: Soft targets (N, V), or None.
        weights: Of the total, shape (V,), or None for 1.
    """
    ignored = targets == options.ignore_index
    z = dense_logits(blanked(head.e, ignored), whole_classifier(head), head.bias, options.softcap)
    if probabilities is None:
        check_range(targets, classes=len(head.c), ignore_index=options.ignore_index)
        target = z.gather(1, torch.where(ignored, 0, targets)[:, None]).squeeze(1)
    else:
        target = (probabilities * z).sum(1)
    lse = scaled_logits(z, options.temperature).logsumexp(1)
    total = z.sum(1) if weights is None else z @ weights.to(z.dtype)
    lse, target, total = (torch.where(ignored, 0, column) for column in (lse, target, total))
    return RowSums(lse, target, total=total, predicted=torch.where(ignored, -1, z.argmax(1)))
