"""The same numbers in plain torch with all the logits: the ground truth of the tests, for any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.head.arguments import Options
from lossworks.head.problem import RowSums


def dense_logits(e: Tensor, c: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Return the logits, float32 or wider, shape (N, V)."""
    logits = F.linear(e, c, bias)
    # bfloat16 has eight bits: a loss of 7 would come in steps of 0.03.
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def reference_sums(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    probabilities: Tensor | None,
    target_offset: Tensor | None,
    temperature: Tensor,
    classes: Tensor | None,
    weights: Tensor | None,
) -> RowSums:
    """Return the sums of every row from dense logits; arguments as for ``head.sums.row_sums``."""
    from lossworks.head.rows import check_range

    z = dense_logits(e, c, bias, options.softcap)
    ignored = targets == options.ignore_index
    if probabilities is None:
        check_range(targets, classes=len(c), ignore_index=options.ignore_index)
        index = torch.where(ignored, 0, targets)[:, None]
        if target_offset is not None:
            z = z.scatter_add(1, index, target_offset.to(z.dtype)[:, None])
        target = z.gather(1, index).squeeze(1)
    else:
        target = (probabilities * z).sum(1)
    u = z / (temperature[:, None] if temperature.dim() else temperature)
    if classes is not None:
        u = u.masked_fill(~classes, float("-inf"))
    p = u.softmax(1)
    total = z.sum(1) if weights is None else z @ weights.to(z.dtype)
    columns = (u.logsumexp(1), target, (p * z).sum(1), total, z.square().sum(1))
    return RowSums(*(torch.where(ignored, 0, column) for column in columns))
