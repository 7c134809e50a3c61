"""Feature shift: the same kinds of things, seen by each site in its own way.

N examples, M clients. Shifts of images (N, C, height, width) change inputs alone; labels stay.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.data.examples import Examples
from lossworks.errors import UserError
from lossworks.tasks.interface import ExampleRows
from lossworks_federated.spec_parts import ShiftKind, SplitSpec
from lossworks_federated.splits import Split

_NOISE, _SITES = 3, 5  # what a random stream is for; the others are of splits


def shifted_training(train: ExampleRows, split: Split, spec: SplitSpec, seed: int) -> ExampleRows:
    """Return training rows as their clients see them: client i in the i-th way, with noise of variance σ·i/M.

    Raises:
        UserError: The inputs are no numbers, or no images where they are to be seen in other ways.
    """
    if not spec.shifts_features:
        return train
    examples = _examples(train, spec)
    inputs, clients = examples.inputs.clone(), len(split.train)
    for client in range(clients):
        rows = torch.from_numpy(np.concatenate((split.train[client], split.test[client])))
        own = inputs[rows]
        if spec.shifts:
            kind = spec.shifts[client % len(spec.shifts)]
            own = _SHIFTS[kind](own, spec.shift_strength, _stream(seed, _SITES, client))
        if spec.noise:
            deviation = (spec.noise * client / clients) ** 0.5
            own = own + deviation * torch.randn(own.shape, generator=_stream(seed, _NOISE, client))
        inputs[rows] = own
    return Examples(inputs, examples.labels, examples.bag_size, examples.further)


def shifted_held_out(held_out: ExampleRows, spec: SplitSpec, seed: int) -> ExampleRows:
    """Return held-out rows as the sites see them, each shift on as many, in turn; noise is put on none."""
    if not spec.shifts:
        return held_out
    examples = _examples(held_out, spec)
    inputs = examples.inputs.clone()
    for place, kind in enumerate(spec.shifts):
        rows = slice(place, None, len(spec.shifts))
        inputs[rows] = _SHIFTS[kind](inputs[rows], spec.shift_strength, _stream(seed, _SITES, -1 - place))
    return Examples(inputs, examples.labels, examples.bag_size, examples.further)


def _examples(rows: ExampleRows, spec: SplitSpec) -> Examples:
    if not isinstance(rows, Examples) or not rows.inputs.is_floating_point():
        told = f"split.noise={spec.noise:g}" if spec.noise else "split.shifts"
        raise UserError(f"{told}: is for inputs that are numbers; leave it out")
    if spec.shifts and rows.inputs.dim() != 4:
        shape = tuple(rows.inputs.shape[1:])
        raise UserError(f"split.shifts: is for images, with channels, height and width; these are {shape}")
    return rows


def _stream(seed: int, purpose: int, number: int) -> torch.Generator:
    numbers = [seed, purpose, number % 2**32]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def _same(images: Tensor, strength: float, stream: torch.Generator) -> Tensor:
    del strength, stream
    return images


def _contrast(images: Tensor, strength: float, stream: torch.Generator) -> Tensor:
    """Return images with less contrast and another brightness: x·(1 − 0.7 s) + s/2, s at most 1."""
    del stream
    s = min(strength, 1.0)
    return images * (1 - 0.7 * s) + 0.5 * s


def _noise(images: Tensor, strength: float, stream: torch.Generator) -> Tensor:
    """Return images with Gaussian noise of the deviation s."""
    return images + strength * torch.randn(images.shape, generator=stream)


def _blur(images: Tensor, strength: float, stream: torch.Generator) -> Tensor:
    """Return images blurred by a Gaussian of the deviation s, in pixels; borders are repeated."""
    del stream
    reach = max(1, round(3 * strength))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / max(strength, 1e-6)) ** 2)
    weights = (weights / weights.sum()).to(images)
    channels = images.shape[1]
    found = F.pad(images, (reach,) * 4, mode="replicate")
    found = F.conv2d(found, weights.reshape(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    return F.conv2d(found, weights.reshape(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)


def _resolution(images: Tensor, strength: float, stream: torch.Generator) -> Tensor:
    """Return images of 1/(1 + s) of the pixels a side, brought back to their size."""
    del stream
    height, width = (max(1, round(side / (1 + strength))) for side in images.shape[-2:])
    return F.interpolate(
        F.adaptive_avg_pool2d(images, (height, width)), size=images.shape[-2:], mode="nearest"
    )


_SHIFTS: dict[ShiftKind, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "none": _same,
    "contrast": _contrast,
    "noise": _noise,
    "blur": _blur,
    "resolution": _resolution,
}
