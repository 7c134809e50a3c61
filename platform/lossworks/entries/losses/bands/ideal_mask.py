"""Cross-entropy of an ideal binary mask: in which bins of a spectrum is the voice the louder part?"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lossworks.catalogue.declaration import Paper, number
from lossworks.losses.interface import Loss
from lossworks.losses.problems import Problem
from lossworks.losses.rows import wide


class IdealMask(Loss):
    """Sigmoid cross-entropy of every bin against a softened mask.

    The mask's 0 and 1 become ``low`` and ``high``, so the loss can't fall below the entropy of ``high``,
    0.09804 nats a bin at 0.98. Other targets in [0, 1], such as the magnitudes that
    ``spectrogram-pretraining`` trains on, are brought to the same range; there it is no likelihood.
    """

    slug = "ibm-mask"
    kind: ClassVar[str] = "bins"
    formula = "mean over bins of max(y, 0) - y t + log(1 + e^{-|y|})"
    paper = Paper(
        "Singing Voice Separation Using a Deep Convolutional Neural Network Trained by Ideal Binary Mask and "
        "Cross Entropy",
        "Lin, Balamurali, Koh, Lui, Herremans",
        2018,
    )
    example = "lossworks train jobs/specs/voices.yaml loss={slug}"

    low: float = number(0.02, "target where the voice is not louder", ge=0, le=0.5, search=(0, 0.1))
    high: float = number(0.98, "target of a bin in which it is", ge=0.5, le=1, search=(0.9, 1))

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`; six bins a row."""
        logits = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
        return Problem(logits, torch.rand(rows, 6, dtype=torch.float64, generator=generator).round())

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of bins.

        Args:
            logits: y, shape (...), floating point.
            targets: Of the mask, in [0, 1], shape (...); NaN for bins that count for nothing.
            given: ``weight`` of each bin, shape (...).

        Returns:
            A scalar, or (...) for ``reduction="none"``; float32 at least.

        Raises:
            UserError: The shapes differ.
        """
        context = self.context(given)
        self.require_shape("targets", targets, logits)
        targets = self.counting(targets, context)
        valid = self.valid_rows(targets)
        y, mask = (torch.where(valid, wide(x), 0) for x in (logits, targets))
        soft = self.low + (self.high - self.low) * mask.to(y)
        values = functional.binary_cross_entropy_with_logits(y, soft, reduction="none")
        return self.reduce_elements(values, valid, context)
