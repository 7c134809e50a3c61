"""The Z-loss of the spherical family, whose cost does not grow with the number of classes."""

import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.head import Mean, Target, Variance
from lossworks.losses.interface import Context, RowLoss
from lossworks.losses.rows import LogitRows

_TINY = 1e-12


def spherical_z(target: Tensor, mean: Tensor, variance: Tensor, a: float, b: float) -> Tensor:
    """Return softplus(a(b − ζ))/a with ζ = (z_y − μ)/σ over the K classes; all of shape (N,)."""
    standardised = (target - mean) / (variance + _TINY).sqrt()
    return F.softplus(a * (b - standardised)) / a


class SphericalZ(RowLoss):
    """Spherical Z-loss: softplus of the label's logit, standardised over the classes.

    It sees a row only through Σz, Σz² and z_y, which for a linear head cost O(D²) a row whatever the number
    of classes (Vincent et al. 2015). It gives no probabilities, and ranks by the logits. It is not the
    penalty on log² Z, which is ``log-z``.
    """

    slug = "spherical-z-loss"
    formula = "softplus(a (b - ζ))/a with ζ = (z_y - μ)/σ"
    paper = Paper(
        "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
        "de Brébisson, Vincent",
        2016,
    )
    products = 0.0
    invariances = ("shift", "scale")

    a: float = number(1.0, "slope: large is a hinge at ζ = b", gt=0, search=(0.1, 10), log=True)
    b: float = number(1.0, "ζ that is asked for; at most √(K−1) can be reached", ge=0, search=(0, 10))

    @property
    def per_row(self) -> tuple[str, ...]:
        """Slope and place."""
        return ("a", "b")

    def values(self, rows: LogitRows, context: Context) -> Tensor:  # noqa: ARG002
        """See :meth:`RowLoss.values`."""
        target, mean, variance = rows(Target(), Mean(), Variance())
        return spherical_z(target, mean, variance, self.a, self.b)
