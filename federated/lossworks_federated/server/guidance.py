"""FedLEx's guidance: how far exploring clients moved each parameter, as a multiplier of later steps.

m explorers.
"""

from typing import Literal

import torch
from torch import Tensor

ScalingOrder = Literal["paper", "reference"]
Scaler = Literal["minmax", "robust"]
GuidanceRescale = Literal["none", "mean"]
_CONSTANT = 1e-12  # spread, as a share of the largest value, below which a tensor is constant


def guidance_matrix(
    displacements: Tensor,
    *,
    order: ScalingOrder = "paper",
    scaler: Scaler = "minmax",
    rescale: GuidanceRescale = "none",
) -> Tensor:
    """Return the guidance G of one parameter tensor (Internò, Olhofer, Jin, Hammer 2024, *FedLEx*).

    An explorer's matrix is D_i = (w⁰ − w_i)². ``order="paper"`` scales every D_i and takes the mean, so that
    one's step size doesn't matter; ``"reference"`` takes the mean and scales it, as the released
    code does, which leaves far larger multipliers. MinMax is (x − min)/(max − min), robust scaling
    (x − median)/(q₇₅ − q₂₅), cut to [0, 1]. A constant tensor has the multiplier 1; without explorers all do.

    Args:
        displacements: w⁰ − w_i, shape (m, …), finite.
        order: When to scale.
        scaler: How.
        rescale: ``mean`` divides by the mean, so that the average step is as long as without guidance
            (ours; entries may then exceed 1); ``none`` as in the paper.

    Returns:
        Shape (…), in the dtype of the displacements; in [0, 1] unless rescaled.
    """
    # By shape, since -1 can't be told where there are none.
    squares = displacements.double().square().reshape(len(displacements), displacements.shape[1:].numel())
    if not len(squares):
        return torch.ones(displacements.shape[1:], dtype=displacements.dtype)
    if order == "paper":
        found = torch.stack([_scaled(one, scaler) for one in squares]).mean(0)
    else:
        found = _scaled(squares.mean(0), scaler)
    if rescale == "mean":
        mean = found.mean()
        found = found / mean if mean > 0 else torch.ones_like(found)
    return found.reshape(displacements.shape[1:]).to(displacements.dtype)


def _scaled(values: Tensor, scaler: Scaler) -> Tensor:
    """Return values (n,) scaled to [0, 1], or ones where they are all alike."""
    if scaler == "minmax":
        low, spread = values.min(), values.max() - values.min()
    else:
        # Not torch.quantile, which takes no more than 2²⁴ values.
        ordered = values.sort().values
        low, spread = _quantile(ordered, 0.5), _quantile(ordered, 0.75) - _quantile(ordered, 0.25)
    if spread <= _CONSTANT * values.abs().max():
        return torch.ones_like(values)
    return ((values - low) / spread).clamp(0, 1)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Return a quantile of sorted values (n,), interpolated linearly."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)
