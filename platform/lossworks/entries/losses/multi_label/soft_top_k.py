"""Soft top-k: cross-entropy of a differentiable choice of k labels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lossworks.catalogue.declaration import Paper, integer, number, switch
from lossworks.errors import UserError
from lossworks.losses.multi_label import MultiLabelLoss, mean_of_counted

_STEPS = {torch.float32: 32, torch.float64: 64}  # halvings beyond which the dtype resolves nothing


def threshold(scores: Tensor, k: Tensor, alpha: float) -> Tensor:
    """Return t with Σ_i sigmoid(α(s_i + t)) = k, shape (N, 1), by bisection.

    Of a sharp choice the sum is k to the last digit for almost any t. So what the k largest lack of 1 is
    compared with what the others have, in logarithms. The bracket holds for any number of labels (the sum is
    at most k if all scores are raised to the largest, and at least k if all are lowered to the least); the
    released code's ±10/α does up to about 20 000·k labels.

    Args:
        scores: s, shape (N, L).
        k: 1 to L - 1, int64, shape (N, 1).
        alpha: α > 0.
    """
    labels = scores.shape[1]
    ordered = scores.sort(1, descending=True).values
    chosen = torch.arange(labels, device=scores.device) < k
    level = torch.logit(k.to(scores) / labels) / alpha
    low, high = level - ordered[:, :1], level - ordered[:, -1:]
    for _ in range(_STEPS[scores.dtype]):
        middle = (low + high) / 2
        exponent = alpha * (ordered + middle)
        logs = F.logsigmoid(torch.where(chosen, -exponent, exponent))
        lacking = logs.masked_fill(~chosen, -torch.inf).logsumexp(1, keepdim=True)
        above = logs.masked_fill(chosen, -torch.inf).logsumexp(1, keepdim=True) > lacking
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


class _LogSoftTopK(torch.autograd.Function):
    """log S, whose Jacobian α(1 - S_i)(1[i=j] - v_j/Σv), v = αS(1-S), needs two sums a row."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: Tensor, alpha: float) -> Tensor:
        exponent = alpha * (scores + threshold(scores, k, alpha))
        ctx.save_for_backward(exponent)
        ctx.alpha = alpha
        return F.logsigmoid(exponent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (exponent,) = ctx.saved_tensors
        own = ctx.alpha * torch.sigmoid(-exponent) * upstream
        # v/Σv, which is 0/0 for a sharp choice unless it is taken in logarithms.
        share = (F.logsigmoid(exponent) + F.logsigmoid(-exponent)).softmax(1)
        return own - share * own.sum(1, keepdim=True), None, None


def log_soft_top_k(scores: Tensor, k: Tensor, alpha: float) -> Tensor:
    """Return log S with S = sigmoid(α(s + t)) and t so that S sums to k; (N, L), int64 (N, 1) to (N, L)."""
    found: Tensor = _LogSoftTopK.apply(scores, k, alpha)
    return found


class SoftTopK(MultiLabelLoss):
    """Soft top-k: minus the mean log of how far each positive is among the top k.

    Positives beyond k can't all be in, so that k should be what is looked at in the end, as in precision at
    5; ``k_of_row`` takes each row's number of positives. As α grows the choice becomes the hard one. The
    threshold is one of all scores of a row, so that ``linear`` builds them.
    """

    slug = "soft-top-k"
    formula = "-1/|P| Σ_j∈P log S_j with S = sigmoid(α (s + t)), Σ S = k, s = (⟨f, g⟩ + b)/τ"
    paper = Paper(
        "Dual-Encoders for Extreme Multi-Label Classification",
        "Gupta, Devvrit, Rawat, Bhojanapalli, Jain, Dhillon",
        2024,
        "section 4.3",
    )

    temperature: float = number(0.05, "τ, which scores are divided by", gt=0, search=(0.01, 1), log=True)
    normalise: bool = switch(True, "embeddings are brought to unit length; scores are taken as they are")
    k: int = integer(5, "labels that are chosen; below the number of labels", ge=1, search=(1, 100), log=True)
    alpha: float = number(
        2.0, "α: sharpness, per unit of s; ∞ is the hard choice", gt=0, search=(0.5, 20), log=True
    )
    k_of_row: bool = switch(False, "k is the row's number of positives, whatever k says")

    def row_losses(self, scores: Tensor, positives: Tensor, counted: Tensor) -> Tensor:
        """See :meth:`MultiLabelLoss.row_losses`; a row of positives alone has nothing to learn."""
        labels, own = scores.shape[1], counted.sum(1, keepdim=True)
        least = 1 if self.k_of_row else self.k
        if least >= labels:
            raise UserError(f"{self.slug}: k={least} must be below the number of labels, {labels}")
        k = own.clamp(1, labels - 1) if self.k_of_row else torch.full_like(own, self.k)
        log_s = log_soft_top_k(scores, k, self.alpha).gather(1, positives)
        return -mean_of_counted(torch.where(own < labels, log_s, 0), counted)
