"""Values by classification: HL-Gauss, two-hot and categorical TD.

Shapes: any number of leading axes (...), m bins.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer, number
from lossworks.losses.interface import Context
from lossworks.losses.problems import Problem
from lossworks.losses.value_head import HistogramLoss

_PAPER = Paper(
    "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL",
    "Farebrother et al.",
    2024,
    "section 3",
)
_BINS = integer(51, "m: bins, the size of the head", ge=2, search=(21, 201), log=True)
_V_MIN = number(-10.0, "least value; choose it before training, with slack of 3σ")
_V_MAX = number(10.0, "largest value")


def gaussian_histogram(values: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """Return q_i ∝ Φ((e_{i+1} - y)/σ) - Φ((e_i - y)/σ), a truncated normal's share of each bin.

    Args:
        values: y in [e_0, e_m], shape (...).
        edges: e, ascending, shape (m + 1,).
        sigma: σ > 0 in the unit of y.
    """
    cumulated = torch.erf((edges - values[..., None]) / (sigma * math.sqrt(2)))
    mass = cumulated.diff(dim=-1)
    return mass / (cumulated[..., -1:] - cumulated[..., :1])


def project(locations: Tensor, masses: Tensor, support: Tensor) -> Tensor:
    """Return masses moved to the two neighbours on an equally spaced support, means kept, shape (..., m).

    Args:
        locations: Where the masses are, within the support, shape (..., j).
        masses: Shape (..., j).
        support: z_1 to z_m, shape (m,).
    """
    step = (support[-1] - support[0]) / (len(support) - 1)
    position = ((locations - support[0]) / step).clamp(0, len(support) - 1)
    # NaN, of an element whose target isn't known, is no index.
    lower = position.nan_to_num().floor().clamp(max=len(support) - 2).long()
    above = position - lower
    q = masses.new_zeros(*masses.shape[:-1], len(support))
    return q.scatter_add(-1, lower, masses * (1 - above)).scatter_add(-1, lower + 1, masses * above)


class HLGauss(HistogramLoss):
    """HL-Gauss: cross-entropy against a histogram of a normal distribution around the target.

    σ = (σ/ς)·ς with the width ς of a bin; σ/ς = K/6 puts the mass on about ⌈K⌉ + 1 bins. The best σ is about
    the same for any m. Values near the ends of the range are biased inwards.
    """

    slug = "hl-gauss"
    formula = "-Σ q_i log p_i with q_i ∝ Φ((e_i+1 - y)/σ) - Φ((e_i - y)/σ)"
    paper = _PAPER

    bins: int = _BINS
    v_min: float = _V_MIN
    v_max: float = _V_MAX
    sigma_ratio: float = number(
        0.75,
        "σ/ς: spread in bins; 0 puts all on the target's bin, and below 0.5 decoding is biased",
        gt=0,
        search=(0.25, 2),
        log=True,
    )

    def edges(self, like: Tensor) -> Tensor:
        """Return the bins' edges, shape (m + 1,)."""
        return torch.linspace(self.v_min, self.v_max, self.bins + 1, dtype=like.dtype, device=like.device)

    def support(self, like: Tensor) -> Tensor:
        """Return the bins' centres."""
        edges = self.edges(like)
        return (edges[1:] + edges[:-1]) / 2

    def distribution(self, targets: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """See :meth:`HistogramLoss.distribution`."""
        # Beyond the range by some σ the released code divides 0 by 0.
        inside = targets.clamp(self.v_min, self.v_max)
        sigma = self.sigma_ratio * (self.v_max - self.v_min) / self.bins
        return gaussian_histogram(inside, self.edges(targets), sigma)


class TwoHot(HistogramLoss):
    """Two-hot: cross-entropy against the two neighbours of the target, weighted so that the mean is kept.

    The paper's equations 3.2 and 3.4 read with the two weights swapped.
    """

    slug = "two-hot"
    formula = "-q_i log p_i - q_i+1 log p_i+1 with q_i = (z_i+1 - y)/(z_i+1 - z_i), q_i+1 = 1 - q_i"
    paper = _PAPER

    bins: int = _BINS
    v_min: float = _V_MIN
    v_max: float = _V_MAX

    def support(self, like: Tensor) -> Tensor:
        """Return the bins' locations, the ends of the range among them."""
        return torch.linspace(self.v_min, self.v_max, self.bins, dtype=like.dtype, device=like.device)

    def distribution(self, targets: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """See :meth:`HistogramLoss.distribution`."""
        located = targets.clamp(self.v_min, self.v_max)[..., None]
        return project(located, torch.ones_like(located), self.support(targets))


class CategoricalTD(TwoHot):
    """Categorical TD (C51): cross-entropy against the next state's distribution, discounted and moved.

    Targets are the rewards r; ``next_probabilities`` p come from the target network, and ``discounts`` γ are
    0 after a last step (γⁿ for returns of n steps). Where γ = 0 it is ``two-hot`` of the reward.
    """

    slug = "categorical-td"
    formula = "-Σ q_i log p_i with q the projection of p' at r + γ z onto z"
    paper = Paper(
        "A Distributional Perspective on Reinforcement Learning",
        "Bellemare, Dabney, Munos",
        2017,
        "algorithm 1, as in Farebrother et al. 2024",
    )
    requires: ClassVar[tuple[str, ...]] = ("next_probabilities", "discounts")
    example: ClassVar[str] = "lossworks train jobs/specs/values.yaml loss={slug}"

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`."""
        plain = super().problem(rows, generator)
        discounts = torch.rand(rows, dtype=torch.float64, generator=generator)
        return plain.given(next_probabilities=plain.prediction.flip(0).softmax(-1), discounts=discounts)

    def distribution(self, targets: Tensor, context: Context) -> Tensor:
        """See :meth:`HistogramLoss.distribution`; ``targets`` are rewards."""
        masses, discounts = context.next_probabilities, context.discounts
        if masses is None or discounts is None:
            raise RuntimeError("the context was checked")
        support = self.support(targets)
        self.require_shape("discounts", discounts, targets)
        self.require_shape("next_probabilities", masses, targets[..., None] * support)
        moved = targets[..., None] + discounts.to(targets)[..., None] * support
        return project(moved.clamp(self.v_min, self.v_max), masses.to(targets), support)
