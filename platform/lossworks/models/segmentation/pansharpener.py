"""A network that adds the detail of a panchromatic image to one band (PNN, Masi et al. 2016).

Shapes: B bands of H × W pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lossworks.errors import UserError
from lossworks.models.interface import Head, HeadedModel
from lossworks.specs.tasks.pansharpening import PansharpenerSpec


class Pansharpener(HeadedModel):
    """Three convolutions, of 7 × 7, 7 × 7 and 5 × 5, beside the band itself.

    Its features are the sharpened band, (B, H, W, 1), and its head is an identity.

    Args:
        spec: What to build.
    """

    identity: Tensor

    def __init__(self, spec: PansharpenerSpec) -> None:
        super().__init__()
        first, second = spec.features
        sizes = ((2, first, 7), (first, second, 7), (second, 1, 5))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(into, out, side, padding=side // 2, padding_mode="reflect") for into, out, side in sizes
        )
        self.register_buffer("identity", torch.ones(1, 1), persistent=False)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the sharpened bands (B, H, W, 1) of smooth band and pan image (B, 2, H, W)."""
        x = inputs
        for convolution in self.convolutions[:-1]:
            x = functional.relu(convolution(x))
        sharp: Tensor = inputs[:, :1] + self.convolutions[-1](x)
        return sharp.movedim(1, -1)

    def head(self) -> Head:
        """Return an identity."""
        return Head(self.identity)

    def blocks(self) -> list[nn.Module]:
        """Return the convolutions."""
        return list(self.convolutions)

    def checkpoint_activations(self) -> None:
        """Refuse: the network is small.

        Raises:
            UserError: Always.
        """
        raise UserError("activation_checkpointing=true is for language models and segmenters")


def build_pansharpener(spec: PansharpenerSpec, *, seed: int) -> Pansharpener:
    """Return the network that ``spec`` describes; its last weights are 0, so it leaves bands as they are.

    The same seed gives bit-identical parameters, and the global random state is left as it was.

    Args:
        spec: What to build.
        seed: Seed of the initial parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = Pansharpener(spec)
        for parameter in found.convolutions[-1].parameters():
            nn.init.zeros_(parameter)
        return found
