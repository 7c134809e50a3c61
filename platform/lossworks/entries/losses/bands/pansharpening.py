"""The two losses of zero-shot pansharpening: the coarse band must be kept, and detail found.

Shapes: B sharpened bands of H × W pixels, coarse ones of h × w, R = H / h.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lossworks.catalogue.declaration import Paper, integer, number
from lossworks.data.cubes import NYQUIST_GAIN, blurred, decimated
from lossworks.errors import UserError
from lossworks.losses.interface import Context, Loss
from lossworks.losses.problems import Problem
from lossworks.losses.rows import wide
from lossworks.models.interface import Outputs

_PAPER = Paper(
    "Zero-Shot Hyperspectral Pansharpening Using Hysteresis-Based Tuning for Spectral Quality Control",
    "Guarino, Ciotola, Vivone, Scarpa",
    2025,
)
_STABLE = 1e-8  # of the squared scale, added to local variances


def local_correlation(a: Tensor, b: Tensor, side: int) -> Tensor:
    """Return Pearson's correlation in a sliding box, (B, H − side + 1, W − side + 1).

    Args:
        a: Shape (B, H, W).
        b: Shaped alike.
        side: Pixels of the box.
    """
    # About their means, or the difference of large squares would leave no digits.
    a, b = (x - x.mean((1, 2), keepdim=True) for x in (a, b))
    means = [functional.avg_pool2d(x[:, None], side, 1)[:, 0] for x in (a, b, a * b, a * a, b * b)]
    of_a, of_b, both, aa, bb = means
    scales = [_STABLE * x.detach().square().mean((1, 2), keepdim=True) for x in (a, b)]
    variances = [(square - mean**2).clamp(min=0) for square, mean in ((aa, of_a), (bb, of_b))]
    deviations = [(v + s + torch.finfo(v.dtype).tiny).sqrt() for v, s in zip(variances, scales, strict=True)]
    return (both - of_a * of_b) / (deviations[0] * deviations[1])


class _BandLoss(Loss):
    """A loss of sharpened bands (B, H, W) against coarse ones (B, h, w), one number each."""

    kind: ClassVar[str] = "band"
    example: ClassVar[str] = "lossworks train jobs/specs/pansharpen.yaml"
    paper = _PAPER

    def prediction(self, outputs: Outputs) -> Tensor:
        """See :meth:`Loss.prediction`; the bands, (B, H, W)."""
        return outputs.logits[..., 0]

    def count(self, targets: Tensor) -> Tensor:
        """See :meth:`Loss.count`; of bands that have a pixel which counts."""
        return self._known(targets).sum()

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`; bands of 16 × 16 pixels, R = 2."""
        sharp, pan = torch.randn(2, rows, 16, 16, dtype=torch.float64, generator=generator)
        coarse = torch.randn(rows, 8, 8, dtype=torch.float64, generator=generator)
        return Problem(sharp, coarse, {"pan": pan} if "pan" in self.requires else {})

    def forward(self, bands: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of sharpened bands.

        Args:
            bands: ŷ, shape (B, H, W), floating point.
            targets: y, shape (B, h, w), floating point; a band with a NaN counts for nothing.
            given: ``weight`` of each band, shape (B,); ``pan``, shape (B, H, W).

        Returns:
            A scalar, or (B,) for ``reduction="none"``.

        Raises:
            UserError: The shapes don't fit.
        """
        context = self.context(given)
        targets = self.counting(targets, context)
        ratio = self._ratio(bands, targets)
        known = self._known(targets)
        with torch.autocast(bands.device.type, enabled=False):
            own, coarse = (torch.where(known[:, None, None], wide(x), 0) for x in (bands, targets))
            return self.reduce_elements(self.bands(own, coarse, ratio, context), known, context)

    def bands(self, sharp: Tensor, coarse: Tensor, ratio: int, context: Context) -> Tensor:
        """Return the loss of each band, (B,)."""
        raise NotImplementedError

    def _known(self, targets: Tensor) -> Tensor:
        return ~targets.isnan().flatten(1).any(1)

    def _ratio(self, bands: Tensor, targets: Tensor) -> int:
        ratio = bands.shape[-1] // max(1, targets.shape[-1])
        if (
            bands.dim() != 3
            or targets.dim() != 3
            or bands.shape != (len(targets), *(ratio * side for side in targets.shape[1:]))
        ):
            raise UserError(
                f"{self.slug}: bands {tuple(bands.shape)} must be (B, R·h, R·w) of targets "
                f"{tuple(targets.shape)}"
            )
        return ratio


class SpectralConsistency(_BandLoss):
    """What the sensor would see of a sharpened band must be the coarse band that it saw.

    The five outermost coarse pixels, where the blur sees beyond the border, don't count.
    """

    slug = "spectral-consistency"
    formula = "mean |↓_R(M ∗ ŷ) − y|"

    gain: float = number(
        NYQUIST_GAIN, "gain of the sensor's blur M at the coarse grid's Nyquist frequency", gt=0, lt=1
    )

    def bands(self, sharp: Tensor, coarse: Tensor, ratio: int, context: Context) -> Tensor:
        """See :meth:`_BandLoss.bands`."""
        del context
        seen = decimated(blurred(sharp, ratio, self.gain), ratio)
        rim = min(5, (min(coarse.shape[1:]) - 1) // 2)
        inner = (seen - coarse).abs()[:, rim : coarse.shape[1] - rim, rim : coarse.shape[2] - rim]
        return inner.flatten(1).mean(1)


class PanCorrelation(_BandLoss):
    """The detail of a sharpened band must follow that of the panchromatic image, brighter or darker.

    ρ is the local correlation; by its absolute value a band may be the pan image's negative. It is 0 for
    any band a·P + b with a ≠ 0.
    """

    slug = "pan-correlation"
    formula = "mean of 1 − |ρ(ŷ, P)| in boxes of side 2·⌈R/2⌉"
    requires = ("pan",)
    invariances = ("shift", "scale")
    flags = ("beside",)

    side: int | None = integer(None, "pixels of a box; unset, 2·⌈R/2⌉", ge=2, le=64, optional=True)

    def bands(self, sharp: Tensor, coarse: Tensor, ratio: int, context: Context) -> Tensor:
        """See :meth:`_BandLoss.bands`."""
        del coarse
        pan = context.others["pan"]
        if pan is None or pan.shape != sharp.shape:
            raise UserError(f"{self.slug}: pan must be {tuple(sharp.shape)}, as the bands are")
        side = min(self.side or 2 * math.ceil(ratio / 2), *sharp.shape[1:])
        found = local_correlation(sharp, pan.to(sharp), side)
        return (1 - found.abs()).flatten(1).mean(1)
