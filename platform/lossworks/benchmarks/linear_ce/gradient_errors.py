"""How far a method's gradients are from those in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 4096  # classes whose float64 logits exist at once
# Multiply-adds of one product that the reference may take: all rows of 2048 x 32768 x 512.
_WORK = 2**35


def sampled_rows(n: int, v: int, d: int) -> int:
    """Return how many of the first rows the errors are measured on; the reference of all may take minutes."""
    return max(1, min(n, _WORK // (v * d)))


def gradient_errors(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], e: Tensor, c: Tensor, y: Tensor
) -> tuple[float, float]:
    """Return ‖g − g64‖ / ‖g64‖ of ∂E and of ∂C, for the mean loss over the first ``sampled_rows``.

    The reference computes in float64 with the values that E (N, D) and C (V, D) have in their own dtype.
    """
    rows = sampled_rows(len(e), *c.shape)
    e = e[:rows].detach().clone().requires_grad_()
    y = y[:rows].clone()
    grad_e, grad_c = torch.autograd.grad(loss(e, c, y), (e, c))
    with torch.no_grad():
        return _compare(grad_e, grad_c, e.double(), c, y)


def _compare(grad_e: Tensor, grad_c: Tensor, e: Tensor, c: Tensor, y: Tensor) -> tuple[float, float]:
    logsumexp = torch.full_like(e[:, 0], -torch.inf)
    for block in c.split(_BLOCK):
        logsumexp = torch.logaddexp(logsumexp, (e @ block.double().t()).logsumexp(1))
    exact_e = torch.zeros_like(e)
    wrong = size = torch.zeros((), dtype=torch.float64, device=e.device)
    for start, block in zip(range(0, len(c), _BLOCK), c.split(_BLOCK), strict=True):
        weights = block.double()
        p = (e @ weights.t() - logsumexp.unsqueeze(1)).exp_()
        here = ((y >= start) & (y < start + len(block))).nonzero().squeeze(1)
        p[here, y[here] - start] -= 1
        p /= len(e)
        exact_e += p @ weights
        exact_c = p.t() @ e
        wrong = wrong + (grad_c[start : start + len(block)] - exact_c).square().sum()
        size = size + exact_c.square().sum()
    return float((grad_e - exact_e).norm() / exact_e.norm()), float((wrong / size).sqrt())
