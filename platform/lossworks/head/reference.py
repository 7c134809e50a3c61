"""The loss in plain torch with all its logits: the ground truth of the tests, for any dtype."""

import torch.nn.functional as F
from torch import Tensor


def reference_losses(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    softcap: float | None,
) -> Tensor:
    """Return the cross-entropy of each row, shape (N,), 0 where ignored; builds the (N, V) logits.

    Args:
        e: Embeddings, shape (N, D).
        c: Classifier, shape (V, D).
        targets: Class indices or ``ignore_index``, shape (N,).
        bias: Shape (V,), or None.
        ignore_index: Target of rows that count for nothing.
        softcap: Cap of the logits' magnitude, or None.
    """
    logits = F.linear(e, c, bias)
    # bfloat16 has eight bits: a loss of 7 would come in steps of 0.03.
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
