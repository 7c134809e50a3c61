"""Betti numbers of masks: how many components they have, and how many holes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossworks.errors import UserError
from lossworks.metrics.persistence import Connectivity


def betti_numbers(mask: NDArray[Any], *, connectivity: Connectivity = 8) -> tuple[int, int]:
    """Return b0, the components of a mask, and b1, its holes.

    A hole is a component of the background that doesn't reach the edge of the image. An empty mask has
    (0, 0), a full one (1, 0).

    Args:
        mask: Shape (H, W); what isn't 0 is foreground.
        connectivity: Whether pixels of the foreground touch at their 4 sides, or at their corners, too: 8, as
            in TopoMortar. The background has the other.

    Raises:
        UserError: The mask is no matrix, or the connectivity is another.
    """
    from scipy.ndimage import generate_binary_structure, label

    if mask.ndim != 2:
        raise UserError(f"a mask of shape {mask.shape} must be (H, W)")
    if connectivity not in (4, 8):
        raise UserError(f"connectivity={connectivity!r} must be 4 or 8")
    foreground, background = (generate_binary_structure(2, 1 + (connectivity == own)) for own in (8, 4))
    # One pixel of background around joins all that reaches the edge.
    around = np.pad(np.asarray(mask) != 0, 1)
    return int(label(around, foreground)[1]), int(label(~around, background)[1]) - 1
