"""Large images read by overlapping windows, whose results are blended.

C channels in, D out; H and W are the sides of the image, w that of a window.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

OVERLAP = 0.25
"""Share of a window's side by which neighbours overlap at least."""


def starts(length: int, window: int, overlap: float = OVERLAP) -> list[int]:
    """Return where windows begin on a side, evenly spaced so that the last one ends with the side.

    Args:
        length: Pixels of the side.
        window: Pixels of a window's side.
        overlap: Share of it that neighbours have in common at least, in [0, 1).

    Example:
        >>> starts(10, 4)
        [0, 3, 6]
        >>> starts(3, 4)
        [0]
    """
    if length <= window:
        return [0]
    stride = max(1, int(window * (1 - overlap)))
    gaps = -(-(length - window) // stride)
    return [place * (length - window) // gaps for place in range(gaps + 1)]


def ramp(length: int, like: Tensor) -> Tensor:
    """Return what the pixels of a window's side weigh, (length,): most in the middle, never 0."""
    place = torch.arange(length, dtype=like.dtype, device=like.device)
    return torch.minimum(place, length - 1 - place) + 1


def blended(read: Callable[[Tensor], Tensor], inputs: Tensor, window: int) -> Tensor:
    """Return what is read of large images, (B, H, W, D), a window at a time.

    Where windows overlap their results are averaged, and weigh less near a window's border, where there is
    the least to be seen around. A linear head may follow: the mean of logits is the head of the mean.

    Args:
        read: From windows (B, C, h, w) to results (B, h, w, D).
        inputs: Images, shape (B, C, H, W).
        window: Pixels of a window's side; smaller sides are read whole.
    """
    total: Tensor | None = None
    weights = inputs.new_zeros(inputs.shape[2:])
    for rows, columns in _windows(inputs, window):
        found = read(inputs[..., rows, columns])
        weight = ramp(found.shape[1], found)[:, None] * ramp(found.shape[2], found)
        if total is None:
            total = found.new_zeros(len(inputs), *inputs.shape[2:], found.shape[-1])
        total[:, rows, columns] += weight[..., None] * found
        weights[rows, columns] += weight.to(weights)
    if total is None:
        raise ValueError("an image has no pixel")
    return total.div_(weights[..., None].to(total))


def _windows(inputs: Tensor, window: int) -> Iterator[tuple[slice, slice]]:
    height, width = inputs.shape[2:]
    for top in starts(height, window):
        for left in starts(width, window):
            yield slice(top, min(top + window, height)), slice(left, min(left + window, width))
