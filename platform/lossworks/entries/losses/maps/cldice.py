"""Soft-clDice: Dice of a mask, and of its centre lines, found by pooling."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lossworks.catalogue.declaration import Paper, integer, number
from lossworks.entries.losses.maps.overlaps import BACKGROUND, dice_of_maps, smoothing_of_maps
from lossworks.losses.maps import MapLoss, Maps

_DOWN, _ACROSS = 2, 3  # axes of maps (B, C, H, W)


def soft_skeleton(maps: Tensor, iterations: int) -> Tensor:
    """Return how much of each pixel is centre line (Shit et al. 2021, algorithm 1).

    Lines of up to 2k + 2 pixels' width have one; it is 0 in the middle of what is wider.

    Args:
        maps: Values from 0 to 1, shape (B, C, H, W).
        iterations: k, how often a pixel is taken off all around.
    """
    eroded = _eroded(maps)
    skeleton = F.relu(maps - _dilated(eroded))
    for _ in range(iterations):
        maps, eroded = eroded, _eroded(eroded)
        rest = F.relu(maps - _dilated(eroded))
        skeleton = skeleton + F.relu(rest - skeleton * rest)
    return skeleton


def _eroded(maps: Tensor) -> Tensor:
    """Return the least of a pixel and its four neighbours."""
    return -torch.maximum(_greatest(-maps, _DOWN), _greatest(-maps, _ACROSS))


def _dilated(maps: Tensor) -> Tensor:
    """Return the greatest of a pixel and its eight neighbours."""
    return _greatest(_greatest(maps, _DOWN), _ACROSS)


def _greatest(maps: Tensor, axis: int) -> Tensor:
    """Return the greatest of a value and the ones before and behind it along an axis, shape alike."""
    found: Tensor = _Greatest.apply(maps, axis)
    return found


class _Greatest(torch.autograd.Function):
    """See :func:`_greatest`: faster than pooling on a CPU. Of equal ones the first has the gradient."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, axis: int) -> Tensor:
        before, own, behind = _beside(maps, axis)
        found = torch.maximum(torch.maximum(before, own), behind)
        ctx.save_for_backward(maps, found)
        ctx.axis = axis
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        maps, found = ctx.saved_tensors
        before, own, _ = _beside(maps, ctx.axis)
        first = before == found
        second = ~first & (own == found)
        spread = F.pad(torch.zeros_like(slope), _around(ctx.axis))
        for place, chosen in enumerate((first, second, ~(first | second))):
            spread.narrow(ctx.axis, place, slope.shape[ctx.axis]).add_(slope * chosen)
        return spread.narrow(ctx.axis, 1, slope.shape[ctx.axis]), None


def _around(axis: int) -> tuple[int, int, int, int]:
    return (0, 0, 1, 1) if axis == _DOWN else (1, 1, 0, 0)


def _beside(maps: Tensor, axis: int) -> list[Tensor]:
    """Return the values before each place along an axis, at it, and behind it; -∞ beyond the map."""
    around = F.pad(maps, _around(axis), value=-torch.inf)
    return [around.narrow(axis, place, maps.shape[axis]) for place in range(3)]


class ClDice(MapLoss):
    """Soft-clDice: Dice of masks, and of how far the centre lines of each lie in the other.

    The mean over the classes of the foreground, image by image. The paper sums both precision and sensitivity
    over the batch: an image's loss then depends on which others are beside it, and a batch in parts has
    another loss than as a whole; ours doesn't. The original code always takes ten iterations; here k is what
    is asked for, and should be half the width of the widest structure, less one. An ignored pixel is
    background in both maps.

    Use it for thin structures whose connectedness counts more than their width: on drawn walls it had fewer
    wrong components than CE+Dice with accurate masks, was not told apart from it with noisy ones, and lost
    Dice with both.
    """

    slug = "cldice"
    formula = (
        "(1-α) Dice + α (1 - 2 P S/(P + S)), P = (Σ s(p) y + 1)/(Σ s(p) + 1), S = (Σ s(y) p + 1)/(Σ s(y) + 1)"
    )
    paper = Paper(
        "clDice - a Novel Topology-Preserving Loss Function for Tubular Structure Segmentation",
        "Shit, Paetzold, Sekuboyina, Ezhov, Unger, Zhylka, Pluim, Bauer, Menze",
        2021,
        "section 3.2 and algorithm 1",
    )

    alpha: float = number(0.5, "α: weight of the centre lines; 0 is map-dice", ge=0, le=1, search=(0, 0.5))
    iterations: int = integer(3, "k: iterations of the soft skeleton", ge=1, search=(1, 10))
    smoothing: float = smoothing_of_maps()
    background: bool = BACKGROUND

    def images(self, maps: Maps) -> Tensor:
        """See :meth:`MapLoss.images`."""
        overlap = dice_of_maps(maps, self.smoothing, background=self.background)
        lines = self._lines(maps.probabilities[:, 1:], maps.targets[:, 1:]).mean(1)
        return (1 - self.alpha) * overlap + self.alpha * lines

    def _lines(self, p: Tensor, y: Tensor) -> Tensor:
        """Return 1 - clDice of maps (B, C, H, W), shape (B, C)."""
        of_p, of_y = (soft_skeleton(one, self.iterations) for one in (p, y))
        precision, sensitivity = _inside(of_p, y), _inside(of_y, p)
        return 1 - 2 * precision * sensitivity / (precision + sensitivity)


def _inside(lines: Tensor, maps: Tensor) -> Tensor:
    """Return the share of centre lines (B, C, H, W) that lies in maps, (B, C); 1 where there are no lines."""
    lines = lines.flatten(2)
    return ((lines * maps.flatten(2)).sum(2) + 1) / (lines.sum(2) + 1)
