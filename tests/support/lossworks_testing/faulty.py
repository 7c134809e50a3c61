"""Losses with the faults that released libraries had, for the audit to find."""

import torch
import torch.nn.functional as F
from torch import nn


class _UniformUpstream(torch.autograd.Function):
    """Forms the gradient in the forward pass, as for a sum, and scales it by the first upstream number."""

    @staticmethod
    def forward(ctx, logits, targets):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = F.cross_entropy(leaf, targets, reduction="none")
            (ctx.gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient * upstream[0], None


class WrongGradientOfNone(nn.Module):
    """Right for sum and mean; wrong for none wherever the upstream gradient is not uniform."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits, targets):
        losses = _UniformUpstream.apply(logits, targets)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


class MeanOfMeans(nn.Module):
    """Calls a mean its sum, so that micro-batches weigh by their number and not by their size."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = "none" if reduction == "none" else "mean"

    def forward(self, logits, targets):
        return F.cross_entropy(logits, targets, reduction=self.reduction)


class Naive(nn.Module):
    """The formula as it is written, which overflows, and in the dtype that it is given."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits, targets):
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        losses = -p.gather(1, targets[:, None]).squeeze(1).log()
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


class LooksAtIgnored(nn.Module):
    """torch's own: an ignored row has no loss, but its softmax times 0 is its gradient."""

    ignore_index = -100

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits, targets):
        losses = F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none"
        )
        if self.reduction == "none":
            return losses
        count = (targets != self.ignore_index).sum() if self.reduction == "mean" else 1
        return losses.sum() / max(int(count), 1)


NOT_A_CLASS = 3
