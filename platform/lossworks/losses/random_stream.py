"""Random numbers of a loss, which go on where they were after a checkpoint."""

import numpy as np
import torch
from torch import Tensor, nn


class RandomStream(nn.Module):
    """Draws that are a function of a seed and of how many came before.

    The count is all its state: one number in the ``state_dict``. Drawn on the CPU, so that every device gets
    the same.

    Args:
        seed: At least 0.

    Attributes:
        draws: How many draws there were, int64, shape ().
    """

    draws: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def count(self) -> int:
        """Return how many draws there were."""
        return int(self.draws)

    def of(self, purpose: int, index: int) -> np.random.Generator:
        """Return the generator of one draw for a purpose, both numbered from 0; it isn't counted."""
        return np.random.default_rng([self.seed, purpose, index])

    def next(self, purpose: int = 0) -> np.random.Generator:
        """Return the next draw's generator, and count it."""
        found = self.of(purpose, self.count())
        self.draws += 1
        return found
