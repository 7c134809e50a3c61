"""A network that tells a voice's bins from others in a few frames of spectra (Lin et al. 2018).

Shapes: B patches of T frames and F frequencies; D features; J = T·F bins.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lossworks.errors import UserError
from lossworks.models.interface import Head, HeadedModel
from lossworks.specs.tasks.separation import MaskNetSpec

_FRAMES = 3  # that a convolution looks at


class MaskNet(HeadedModel):
    """Twice two convolutions and a maximum over frequencies, two full layers, and a logit for each bin.

    Args:
        spec: What to build.
        frames: T.
        bins: F.

    Raises:
        UserError: No frequency is left after both maxima.
    """

    def __init__(self, spec: MaskNetSpec, frames: int, bins: int) -> None:
        super().__init__()
        left = bins // spec.pool // spec.pool
        if left < 1:
            raise UserError(f"model.pool={spec.pool}: nothing is left of {bins} frequencies after two of it")
        m = spec.maps
        channels = ((1, m), (m, m // 2), (m // 2, 2 * m), (2 * m, m))
        kernel = (_FRAMES, spec.kernel)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(into, out, kernel, padding=(_FRAMES // 2, 0)) for into, out in channels
        )
        self.around = ((spec.kernel - 1) // 2, spec.kernel // 2)  # zeros, so that all frequencies stay
        self.pool, self.dropout = spec.pool, nn.Dropout(spec.dropout)
        self.full = nn.ModuleList(
            (nn.Linear(m * frames * left, spec.hidden), nn.Linear(spec.hidden, spec.hidden // 4))
        )
        self.classifier = nn.Linear(spec.hidden // 4, frames * bins)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the features (B, D) of patches (B, T, F)."""
        x = inputs[:, None]
        for place, convolution in enumerate(self.convolutions):
            x = functional.relu(convolution(functional.pad(x, self.around)))
            if place % 2:
                x = functional.max_pool2d(x, (1, self.pool))
        x = x.flatten(1)
        for layer in self.full:
            x = functional.relu(layer(self.dropout(x)))
        return x

    def head(self) -> Head:
        """Return the head with its bias."""
        return Head(self.classifier.weight, self.classifier.bias)

    def blocks(self) -> list[nn.Module]:
        """Return convolutions and full layers."""
        return [*self.convolutions, *self.full]

    def checkpoint_activations(self) -> None:
        """Refuse: the network is small.

        Raises:
            UserError: Always.
        """
        raise UserError("activation_checkpointing=true is for language models and segmenters")


def build_mask_net(spec: MaskNetSpec, *, frames: int, bins: int, seed: int) -> MaskNet:
    """Return the network that ``spec`` describes; the same seed gives bit-identical parameters.

    Args:
        spec: What to build.
        frames: T.
        bins: F.
        seed: Seed of the initial parameters; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskNet(spec, frames, bins)
