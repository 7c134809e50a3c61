"""The comp-sum family: cross-entropy, generalised cross-entropy, mean absolute error and between."""

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Case, Paper, number
from lossworks.losses.interface import RowLoss

_LARGEST = 80.0  # of the exponent, so that 1/p stays finite in float32


def comp_sum(target: Tensor, logsumexp: Tensor, tau: float | Tensor) -> Tensor:
    """Return Φ_τ(1/p_y − 1) = expm1((τ−1)·log p_y)/(1−τ), or −log p_y at τ = 1; shapes (N,).

    Args:
        target: z_y, shape (N,).
        logsumexp: Shape (N,).
        tau: τ ≥ 0, a number or a tensor that broadcasts with the rows.
    """
    log_p = target - logsumexp
    if isinstance(tau, Tensor):
        plain = tau == 1
        # Rows of τ = 1 are given another, since a gradient of 0/0 would be NaN though it isn't chosen.
        return torch.where(plain, -log_p, comp_sum_apart(log_p, torch.where(plain, 0, tau)))
    return -log_p if tau == 1 else comp_sum_apart(log_p, tau)


def comp_sum_apart(log_p: Tensor, tau: float | Tensor) -> Tensor:
    """Return the same of log p_y for τ ≠ 1."""
    return ((tau - 1) * log_p).clamp(max=_LARGEST).expm1() / (1 - tau)


class CompSum(RowLoss):
    """Comp-sum losses: cross-entropy reweighted by the τ−1st power of the label's probability.

    τ = 0 is the sum-exponential loss 1/p − 1, τ = 1 cross-entropy, 1 < τ < 2 generalised cross-entropy with
    q = τ − 1, and τ = 2 is 1 − p, half the mean absolute error. The larger τ, the less a row weighs whose
    label has a small probability: robust against wrong labels, slow to start with many classes.
    """

    slug = "comp-sum"
    formula = "((1+u)^(1-τ) - 1)/(1-τ) with 1+u = 1/p_y; log(1+u) at τ = 1"
    paper = Paper(
        "Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
        "Mao, Mohri, Zhong",
        2023,
        "section 2",
    )
    invariances = ("shift",)
    cases = (Case({"tau": 1.0}, "cross-entropy"),)

    tau: float = number(
        1.0, "τ: 0 sum-exponential, 1 cross-entropy, 2 mean absolute error", ge=0, search=(0, 2)
    )

    @property
    def per_row(self) -> tuple[str, ...]:
        """The name of the power τ."""
        return ("tau",)

    def phi(self, target: Tensor, logsumexp: Tensor, classes: int) -> Tensor:  # noqa: ARG002
        """See :meth:`RowLoss.phi`."""
        return comp_sum(target, logsumexp, self.tau)
