"""How the next token is drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lossworks.errors import RunError, UserError

DrawSeed = int | Sequence[int]
"""Of one row's draws: what numpy's ``SeedSequence`` takes."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's distribution.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Draws among the fewest likeliest tokens whose probabilities, at that temperature, add up to at
            least this; 1 draws among all.

    References:
        Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1, for ``top_p``.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: One is out of its range.
        """
        if not 0.0 <= self.temperature < float("inf"):  # so written that NaN is refused, too
            raise UserError(f"temperature={self.temperature}: must be at least 0")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1")

    def choose(self, logits: Tensor, draws: Sequence[Iterator[float]]) -> Tensor:
        """Return one token for each row, (B,) int64.

        A row takes one number of its own stream and nothing else, so that the other rows don't matter to it.

        Args:
            logits: (B, V), floating point.
            draws: B streams of numbers in [0, 1); not read at temperature 0.

        Raises:
            RunError: The logits of a row hold NaN or +∞, or are all −∞.
        """
        top = logits.amax(dim=-1, keepdim=True)
        if not bool(top.isfinite().all()):
            raise RunError("the model's logits are not finite, so that no token can be drawn from them")
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        # Shifted before the division, so that a tiny temperature gives −∞ at worst, and never ∞ − ∞.
        p = ((logits - top).double() / self.temperature).softmax(dim=-1)
        order = None
        if self.top_p < 1.0:
            p, order = p.sort(dim=-1, descending=True, stable=True)
            p = p.where(p.cumsum(dim=-1) - p < self.top_p, 0.0)
        sums = p.cumsum(dim=-1)
        given = torch.tensor([next(stream) for stream in draws], dtype=torch.float64, device=p.device)
        # Below the last sum whatever the rounding: there is always a token of positive probability left.
        height = torch.minimum(
            given[:, None] * sums[:, -1:], torch.nextafter(sums[:, -1:], sums.new_zeros(1))
        )
        place = torch.searchsorted(sums, height, right=True)
        return (place if order is None else order.gather(-1, place))[:, 0]


def stream(seed: DrawSeed) -> Iterator[float]:
    """Yield numbers that are uniform in [0, 1), without end; the same for the same seed on any device."""
    generator = np.random.default_rng(seed)
    while True:
        yield float(generator.random())
