"""Betti matching: Dice, and the components and loops in which a map and its mask differ."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number, switch
from lossworks.entries.losses.maps.overlaps import BACKGROUND, dice_of_maps, smoothing_of_maps
from lossworks.losses.maps import MapLoss, Maps, seen
from lossworks.metrics.betti_matching import MatchedBars, betti_matching


class BettiMatching(MapLoss):
    """Betti matching: Dice, and the squared lengths of bars of topology that have no match in the mask.

    Every class of the foreground is a map of probabilities against its mask; the loss is their mean. Births
    and deaths are values of pixels, which have the gradient; which bars match is a constant, found on the
    CPU. A map of 256 by 256 pixels takes up to half a second, so train on patches. Early maps have thousands
    of bars: train with ``map-dice`` first and begin from that run, or let the weight of this loss grow over
    steps beside it. An ignored pixel is 0 in both maps. The frame has the value 1; the released code gives it
    the largest value of each map.

    Use it late in training and with accurate masks: there it halved the wrong holes of drawn walls, and cost
    0.008 of Dice. With noisy masks it learns their topology, and was no better than CE+Dice.
    """

    slug = "betti-matching"
    formula = "Dice + α (Σ_matched 2 [(b-b')² + (d-d')²] + Σ_unmatched (b-d)²)"
    paper = Paper(
        "Topologically Faithful Image Segmentation via Induced Matching of Persistence Barcodes",
        "Stucki, Paetzold, Shit, Menze, Bauer",
        2023,
        "section 4",
    )

    alpha: float = number(
        0.5, "α: weight of the bars; 0 is map-dice", ge=0, le=10, search=(0.01, 1), log=True
    )
    frame: bool = switch(True, "whether what touches the edge is joined to a border of ones", search=True)
    diagonal: bool = switch(
        False, "whether foreground touches at corners, too (the T-construction; the paper's is V)"
    )
    smoothing: float = smoothing_of_maps()
    background: bool = BACKGROUND

    def images(self, maps: Maps) -> Tensor:
        """See :meth:`MapLoss.images`."""
        overlap = dice_of_maps(maps, self.smoothing, background=self.background)
        return overlap + self.alpha * self._bars(maps).mean(1) if self.alpha else overlap

    def _bars(self, maps: Maps) -> Tensor:
        """Return the loss of the bars of each image and class, (B, C)."""
        p, y = maps.probabilities[:, 1:], maps.targets[:, 1:]
        if self.frame:
            p, y = (F.pad(one, (1, 1, 1, 1), value=1.0) for one in (p, y))
        values, masks = seen(p.flatten(0, 1)), seen(y.flatten(0, 1))
        if values is None or masks is None:
            return p.flatten(2).sum(2)
        ours, theirs = (one.flatten(0, 1).flatten(1) for one in (p, y))
        found = [self._of_bars(ours[i], theirs[i], values[i], masks[i]) for i in range(len(ours))]
        return torch.stack(found).reshape(p.shape[:2])

    def _of_bars(self, p: Tensor, y: Tensor, values: NDArray[Any], mask: NDArray[Any]) -> Tensor:
        bars = betti_matching(values, mask, connectivity=8 if self.diagonal else 4)
        return lengths_and_differences(p, y, bars)


def lengths_and_differences(p: Tensor, y: Tensor, bars: MatchedBars) -> Tensor:
    """Return 2·(squared differences of matched bars) + squared lengths of the others, a scalar.

    The components that never die are matched, and both die at 0.

    Args:
        p: Values of the first map, shape (H·W,).
        y: Values of the second, shape (H·W,).
        bars: Of both.
    """
    of_p, of_y = (np.concatenate(ends) for ends in (_ends(bars, slice(0, 2)), _ends(bars, slice(2, 4))))
    place = torch.from_numpy
    matched = p[place(of_p).to(p.device)] - y[place(of_y).to(y.device)]
    alone = [
        (values[ends[:, 0]] - values[ends[:, 1]]).square().sum()
        for values, dims in ((p, bars.of_first), (y, bars.of_second))
        for ends in [place(np.concatenate(dims)).to(values.device)]
    ]
    return 2 * matched.square().sum() + alone[0] + alone[1]


def _ends(bars: MatchedBars, columns: slice) -> list[NDArray[Any]]:
    """Return the births and deaths of the matched bars of one map, and the birth that never dies."""
    which = 0 if columns.start == 0 else 1
    return [*(one[:, columns].reshape(-1) for one in bars.matched), bars.essential[which : which + 1]]
