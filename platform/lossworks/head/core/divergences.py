"""Divergences of two distributions over classes, class by class, with their slopes."""

from typing import Literal, get_args

import torch
from torch import Tensor

from lossworks.errors import UserError
from lossworks.head.core.arguments import check_choice, check_number

DivergenceKind = Literal["forward-kl", "reverse-kl", "jensen-shannon", "total-variation"]


def check_divergence(kind: str, weight: float) -> None:
    """Refuse an unknown kind, and a weight β that is none.

    Raises:
        UserError: Naming it.
    """
    check_choice("kind", kind, get_args(DivergenceKind))
    check_number("weight", weight)
    if not 0 < weight < 1:
        raise UserError(f"weight={weight} must be between 0 and 1; their limits are the two KL divergences")


def parts(kind: str, log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Return each class's part of a divergence of p and q, shaped like their logarithms.

    Where a probability is 0 its part is the limit: 0, or infinite where the other one is not 0.

    Args:
        kind: ``forward-kl`` is q log(q/p), ``reverse-kl`` p log(p/q), ``jensen-shannon``
            β q log(q/m) + (1 − β) p log(p/m) with m = β q + (1 − β) p, ``total-variation`` |p − q|/2.
        log_p: Of the student.
        log_q: Of the teacher.
        weight: β, of Jensen-Shannon alone.
    """
    if kind == "forward-kl":
        return _times_log_ratio(log_q, log_p)
    if kind == "reverse-kl":
        return _times_log_ratio(log_p, log_q)
    if kind == "total-variation":
        return (log_p.exp() - log_q.exp()).abs() / 2
    log_m = _mixture(log_p, log_q, weight)
    return weight * _times_log_ratio(log_q, log_m) + (1 - weight) * _times_log_ratio(log_p, log_m)


def slopes(kind: str, log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Return ∂/∂log p of :func:`parts`, in the same shape."""
    p = log_p.exp()
    if kind == "forward-kl":
        return -log_q.exp()
    if kind == "reverse-kl":
        return _times_log_ratio(log_p, log_q) + p
    if kind == "total-variation":
        return (p - log_q.exp()).sign() * p / 2
    return (1 - weight) * _times_log_ratio(log_p, _mixture(log_p, log_q, weight))


def with_rest(log_p: Tensor) -> Tensor:
    """Return log-probabilities (N, K) with that of all other classes together behind them, (N, K + 1).

    What is left below the dtype's rounding can't be known, and is taken for as much.
    """
    covered = log_p.logsumexp(1, keepdim=True).clamp(max=-torch.finfo(log_p.dtype).eps)
    return torch.cat((log_p, (-torch.expm1(covered)).log()), dim=1)


def _mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Return log(β q + (1 − β) p)."""
    shares = torch.tensor([weight, 1 - weight], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_q + shares[0], log_p + shares[1])


def _times_log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return a log(a/b), 0 where a is, with finite gradients there."""
    there = log_a > -torch.inf
    log_a, log_b = (torch.where(there, x, 0) for x in (log_a, log_b))
    return torch.where(there, log_a.exp() * (log_a - log_b), 0)
