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


def parts(kind: str, log_p: Tensor, log_q: Tensor, weight: float, *, finite: bool = False) -> Tensor:
    """Return each class's part of a divergence of p and q, shaped like their logarithms.

    Where a probability is 0 its part is the limit: 0, or infinite where the other one is not 0.

    Args:
        kind: ``forward-kl`` is q log(q/p), ``reverse-kl`` p log(p/q), ``jensen-shannon``
            β q log(q/m) + (1 − β) p log(p/m) with m = β q + (1 − β) p, ``total-variation`` |p − q|/2.
        log_p: Of the student.
        log_q: Of the teacher.
        weight: β, of Jensen-Shannon alone.
        finite: Whether no logarithm is −∞, which saves the looks for it.
    """
    if kind == "forward-kl":
        return _times_log_ratio(log_q, log_p, finite=finite)
    if kind == "reverse-kl":
        return _times_log_ratio(log_p, log_q, finite=finite)
    if kind == "total-variation":
        return (log_p.exp() - log_q.exp()).abs() / 2
    log_m = _mixture(log_p, log_q, weight)
    of_teacher, own = (_times_log_ratio(x, log_m, finite=finite) for x in (log_q, log_p))
    return weight * of_teacher + (1 - weight) * own


def slopes(kind: str, log_p: Tensor, log_q: Tensor, weight: float, *, finite: bool = False) -> Tensor:
    """Return ∂/∂log p of :func:`parts`, in the same shape; arguments as there."""
    if kind == "forward-kl":
        return log_q.exp().neg_()
    if kind == "reverse-kl":
        return _times_log_ratio(log_p, log_q, finite=finite) + log_p.exp()
    if kind == "total-variation":
        p = log_p.exp()
        return (p - log_q.exp()).sign_().mul_(p).div_(2)
    return (1 - weight) * _times_log_ratio(log_p, _mixture(log_p, log_q, weight), finite=finite)


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


def _times_log_ratio(log_a: Tensor, log_b: Tensor, *, finite: bool) -> Tensor:
    """Return a log(a/b), 0 where a is, with finite gradients there."""
    if finite:
        return log_a.exp() * (log_a - log_b)
    there = log_a > -torch.inf
    log_a, log_b = (torch.where(there, x, 0) for x in (log_a, log_b))
    return torch.where(there, log_a.exp() * (log_a - log_b), 0)
