"""Losses as functions of a row's sums."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lossworks.errors import UserError
from lossworks.head.core.problem import Coefficients, RowSums


@dataclass(frozen=True, eq=False)
class CrossEntropyFormula:
    r"""Cross-entropy and its companions, ℓ = A·nll + B·lse − S·total/τ + Z·lse², with weights per row.

    Here :math:`\mathrm{lse} = \log \sum_k \exp(z_k/τ)`, :math:`\mathrm{nll} = s\,\mathrm{lse} - t/τ` with the
    target's logit t (s = 1; for soft targets :math:`t = \sum_k q_k z_k` and :math:`s = \sum_k q_k`), and
    :math:`\mathrm{total} = \sum_k w_k z_k`.

    Attributes:
        nll_weight: A, shape (N,).
        lse_weight: B, shape (N,), or None for 0.
        total_weight: S, shape (N,), or None for 0.
        square_weight: Z, shape (N,), or None for 0.
        mass: s, shape (N,), or None for 1.
        class_weight: w, shape (V,), or None for 1.
        temperature: τ > 0.
    """

    nll_weight: Tensor
    lse_weight: Tensor | None = None
    total_weight: Tensor | None = None
    square_weight: Tensor | None = None
    mass: Tensor | None = None
    class_weight: Tensor | None = None
    temperature: float = 1.0

    def part(self, rows: slice) -> "CrossEntropyFormula":
        """Return the loss of some rows."""

        def of(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else weight[rows]

        return replace(
            self,
            nll_weight=self.nll_weight[rows],
            lse_weight=of(self.lse_weight),
            total_weight=of(self.total_weight),
            square_weight=of(self.square_weight),
            mass=of(self.mass),
        )

    def losses(self, sums: RowSums, nll: Tensor) -> Tensor:
        """Return the losses (N,) from the rows' sums and their nll."""
        losses = self.nll_weight * nll
        if self.lse_weight is not None:
            losses = losses + self.lse_weight * sums.logsumexp
        if self.square_weight is not None:
            losses = losses + self.square_weight * sums.logsumexp.square()
        if self.total_weight is not None and sums.total is not None:
            losses = losses - self.total_weight * sums.total / self.temperature
        return losses

    def coefficients(self, sums: RowSums) -> Coefficients:
        """Return the coefficients of the gradient of the summed losses."""
        slope = self.nll_weight if self.mass is None else self.nll_weight * self.mass  # ∂ℓ/∂lse
        if self.lse_weight is not None:
            slope = slope + self.lse_weight
        if self.square_weight is not None:
            slope = slope + 2 * self.square_weight * sums.logsumexp
        return Coefficients(
            softmax=slope / self.temperature,
            target=-self.nll_weight / self.temperature,
            constant=None if self.total_weight is None else -self.total_weight / self.temperature,
            constant_weights=self.class_weight,
        )

    def __call__(self, sums: RowSums, rows: slice) -> tuple[Tensor, Coefficients]:
        """Return the losses of some rows and the coefficients of their sum's gradient."""
        own = self.part(rows)
        return own.losses(sums, negative_log_likelihood(sums, self.temperature, own.mass)), own.coefficients(
            sums
        )


def negative_log_likelihood(sums: RowSums, temperature: float | Tensor, mass: Tensor | None) -> Tensor:
    """Return s·lse − t/τ, shape (N,), without cancellation where the logits have a large common offset.

    Args:
        sums: Of the rows.
        temperature: τ, one number or shape (N,).
        mass: s, shape (N,), or None for 1.
    """
    maximum, log_total = sums.shifted()
    scaled = sums.target / temperature
    if mass is None:
        return (maximum - scaled) + log_total
    return (mass * maximum - scaled) + mass * log_total


def negative_log_likelihood_with_gradient(
    sums: RowSums, temperature: float | Tensor, mass: Tensor | None
) -> Tensor:
    """Return the same numbers (N,) with the gradient of s·lse − t/τ, in which m is no variable of its own."""
    plain = sums.logsumexp if mass is None else mass * sums.logsumexp
    plain = plain - sums.target / temperature
    return plain + (negative_log_likelihood(sums, temperature, mass) - plain).detach()


def require_one_a_row(losses: Tensor, target: Tensor) -> None:
    """Refuse losses that are not shaped like the rows' targets, (T,): they would be broadcast.

    Raises:
        UserError: With both shapes.
    """
    if losses.shape != target.shape:
        raise UserError(
            f"the loss returns {tuple(losses.shape)} for {tuple(target.shape)} rows; it must return one "
            "number a row"
        )


def differentiated(
    loss: Callable[..., Tensor],
    temperature: float,
    weight: Tensor | None = None,
    *,
    slopes: bool = True,
) -> Callable[[RowSums, slice], tuple[Tensor, Coefficients]]:
    """Turn a differentiable loss of (target, τ·logsumexp), both (T,), into a rule.

    Where the sums hold a divergence it is the loss's third argument. The coefficients are the partial
    derivatives, one number per row, so no row may look at another. Losses are multiplied by ``weight`` (N,),
    if there is one. Without ``slopes`` nothing is differentiated, as under ``torch.inference_mode``, which
    forbids it.

    Raises:
        UserError: By the rule: the loss returns another shape.
    """

    def rule(sums: RowSums, rows: slice) -> tuple[Tensor, Coefficients]:
        further = () if sums.divergence is None else (sums.divergence,)
        seen = [x.detach() for x in (sums.target, sums.logsumexp * temperature, *further)]
        with torch.set_grad_enabled(slopes):
            seen = [x.requires_grad_(slopes) for x in seen]
            losses = loss(*seen)
            require_one_a_row(losses, sums.target)
            losses = losses if weight is None else weight[rows] * losses
            if not slopes:
                return losses, Coefficients()
            found = torch.autograd.grad(losses.sum(), seen, allow_unused=True, materialize_grads=not further)
        by_target, by_lse, *by_divergence = found
        return losses.detach(), Coefficients(
            softmax=by_lse, target=by_target, divergence=by_divergence[0] if by_divergence else None
        )

    return rule
