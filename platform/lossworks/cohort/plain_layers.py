"""Perceptrons and plain convolutional networks of all members at once, with gradients written by hand.

Each layer of all members is one batched product, and so are its gradients. ``torch.func.vmap`` takes three
times as long for perceptrons; its convolutions in groups, one a member, take twice as long as products of
windows.

Shapes: M members, B examples a member, C channels in and O out, S… positions. Positions lie before channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossworks.models import Classifier, HeadedModel

Tensors = dict[str, Tensor]


class PlainLayer(ABC):
    """A layer of M members."""

    @abstractmethod
    def forward(self, params: Tensors, x: Tensor) -> tuple[Tensor, Any]:
        """Return what it gives, and what its gradients need of this call.

        Args:
            params: Of the whole model by name, (M, …).
            x: What it reads, (M, B, …).
        """

    @abstractmethod
    def backward(self, params: Tensors, kept: Any, slope: Tensor, found: Tensors, *, first: bool) -> Tensor:
        """Return the gradient of what it has read, and add those of its parameters to ``found``.

        Args:
            params: As in the forward call.
            kept: What that returned.
            slope: Gradient of what it gave.
            found: Gradients by name.
            first: Whether nobody needs the gradient of what it has read; anything may be returned then.
        """


class _Flat(PlainLayer):
    def forward(self, params: Tensors, x: Tensor) -> tuple[Tensor, Any]:
        del params
        return x.flatten(2), x.shape

    def backward(self, params: Tensors, kept: Any, slope: Tensor, found: Tensors, *, first: bool) -> Tensor:
        del params, found, first
        return slope.view(kept)


class _ChannelsLast(PlainLayer):
    def forward(self, params: Tensors, x: Tensor) -> tuple[Tensor, Any]:
        del params
        return x.movedim(2, -1), None

    def backward(self, params: Tensors, kept: Any, slope: Tensor, found: Tensors, *, first: bool) -> Tensor:
        del params, kept, found, first
        return slope.movedim(-1, 2)


class _Rectified(PlainLayer):
    def forward(self, params: Tensors, x: Tensor) -> tuple[Tensor, Any]:
        del params
        y = x.relu_()  # nobody looks at what the layer before gave
        return y, y

    def backward(self, params: Tensors, kept: Any, slope: Tensor, found: Tensors, *, first: bool) -> Tensor:
        del params, found, first
        of_read: Tensor = torch.ops.aten.threshold_backward(slope, kept, 0)
        return of_read


class _MeanOfPositions(PlainLayer):
    def forward(self, params: Tensors, x: Tensor) -> tuple[Tensor, Any]:
        del params
        return x.flatten(2, -2).mean(2), x.shape

    def backward(self, params: Tensors, kept: Any, slope: Tensor, found: Tensors, *, first: bool) -> Tensor:
        del params, found, first
        positions = kept[2:-1]
        spread = slope / positions.numel()
        of_read: Tensor = spread.view(*slope.shape[:2], *[1] * len(positions), kept[-1]).expand(kept)
        return of_read


class _Linear(PlainLayer):
    def __init__(self, name: str) -> None:
        self._name = name

    def forward(self, params: Tensors, x: Tensor) -> tuple[Tensor, Any]:
        weight, bias = params[f"{self._name}.weight"], params[f"{self._name}.bias"]
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)), x

    def backward(self, params: Tensors, kept: Any, slope: Tensor, found: Tensors, *, first: bool) -> Tensor:
        found[f"{self._name}.weight"] = torch.bmm(slope.transpose(1, 2), kept)
        found[f"{self._name}.bias"] = slope.sum(1)
        return slope if first else torch.bmm(slope, params[f"{self._name}.weight"])


class _Convolution(PlainLayer):
    """The windows of all positions are copied one below the other, and multiplied by the kernels."""

    def __init__(self, name: str, layer: nn.Conv1d | nn.Conv2d) -> None:
        self._name = name
        self._sides, self._strides = layer.kernel_size, layer.stride
        self._padding = tuple(map(int, layer.padding))
        # From the last axis to the first, of which channels are the last.
        self._pads = [0, 0, *(pad for of in reversed(self._padding) for pad in (of, of))]

    def forward(self, params: Tensors, x: Tensor) -> tuple[Tensor, Any]:
        padded = F.pad(x, self._pads)
        windows = padded
        for axis, (side, stride) in enumerate(zip(self._sides, self._strides, strict=True), 2):
            windows = windows.unfold(axis, side, stride)
        many = len(self._sides)
        positions = windows.shape[2 : 2 + many]
        # (M, B, S…, C, sides…) to a row a position, in which a window's channels lie side by side.
        rows = windows.movedim(2 + many, -1).reshape(len(x), -1, prod(self._sides) * x.shape[-1])
        bias = params[f"{self._name}.bias"]
        found = torch.baddbmm(bias[:, None], rows, self._kernels(params).transpose(1, 2))
        return found.view(*x.shape[:2], *positions, -1), (rows, padded.shape, positions)

    def _kernels(self, params: Tensors) -> Tensor:
        """Return the kernels, (M, O, sides · C)."""
        return params[f"{self._name}.weight"].movedim(2, -1).flatten(2)

    def backward(self, params: Tensors, kept: Any, slope: Tensor, found: Tensors, *, first: bool) -> Tensor:
        rows, shape, positions = kept
        slope = slope.reshape(len(slope), -1, slope.shape[-1])
        own = torch.bmm(slope.transpose(1, 2), rows)
        found[f"{self._name}.weight"] = own.view(*own.shape[:2], *self._sides, -1).movedim(-1, 2)
        found[f"{self._name}.bias"] = slope.sum(1)
        if first:
            return slope
        of_windows = torch.bmm(slope, self._kernels(params))
        of_windows = of_windows.view(*shape[:2], *positions, *self._sides, -1)
        return self._folded(of_windows, shape, positions)

    def _folded(self, of_windows: Tensor, shape: torch.Size, positions: torch.Size) -> Tensor:
        """Return the sums of what windows (M, B, S…, sides…, C) say of each position, without the padding."""
        whole = of_windows.new_zeros(shape)
        for place in product(*map(range, self._sides)):
            steps = zip(place, positions, self._strides, strict=True)
            seen = [slice(at, at + stride * (count - 1) + 1, stride) for at, count, stride in steps]
            own: tuple[Any, ...] = (..., *place, slice(None))
            whole[:, :, *seen] += of_windows[own]
        inner = [slice(pad, size - pad) for pad, size in zip(self._padding, shape[2:-1], strict=True)]
        return whole[:, :, *inner]


def plain_layers(model: HeadedModel) -> list[PlainLayer] | None:
    """Return the layers of a perceptron or a plain convolutional network, the head last; None for others."""
    if not isinstance(model, Classifier):
        return None
    parts: list[tuple[str, nn.Module]] = []
    for index, block in enumerate(model.layers):
        if not isinstance(block, nn.Sequential):
            return None
        parts += [(f"layers.{index}.{place}", part) for place, part in enumerate(block)]
    flat = any(isinstance(part, nn.Flatten) for _, part in parts)
    found = [_of(name, part, flat) for name, part in parts]
    around = ([], []) if flat else ([_ChannelsLast()], [_MeanOfPositions()])
    layers = [*around[0], *found, *around[1], _Linear("classifier")]
    return None if None in layers else [layer for layer in layers if layer is not None]


def _of(name: str, part: nn.Module, flat: bool) -> PlainLayer | None:
    """Return a layer on stacks, None if there is none of its kind; ``flat``: examples are vectors."""
    if type(part) is nn.ReLU:
        return _Rectified()
    if flat:
        return _Flat() if type(part) is nn.Flatten else _Linear(name) if type(part) is nn.Linear else None
    if type(part) not in (nn.Conv1d, nn.Conv2d) or not isinstance(part, nn.Conv1d | nn.Conv2d):
        return None
    plain = part.groups == 1 and set(part.dilation) == {1} and part.bias is not None
    zeros = part.padding_mode == "zeros" and not isinstance(part.padding, str)
    return _Convolution(name, part) if plain and zeros else None


def forward_all(
    layers: Sequence[PlainLayer], params: Tensors, inputs: Tensor
) -> tuple[Tensor, Tensor, list[Any]]:
    """Return features (M, B, D), logits (M, B, K) and what gradients need, of inputs (M, B, …)."""
    x, kept = inputs, []
    for layer in layers[:-1]:
        x, own = layer.forward(params, x)
        kept.append(own)
    logits, own = layers[-1].forward(params, x)
    return x, logits, [*kept, own]


def backward_all(
    layers: Sequence[PlainLayer],
    params: Tensors,
    kept: Sequence[Any],
    slope: Tensor,
    of_hidden: Tensor | None,
) -> Tensors:
    """Return the gradients of parameters from those of logits (M, B, K) and of features (M, B, D).

    Autograd would give the same, at twice the cost of a step of small models.
    """
    found: Tensors = {}
    learning = next(place for place, layer in enumerate(layers) if isinstance(layer, _Linear | _Convolution))
    for place in range(len(layers) - 1, learning - 1, -1):
        slope = layers[place].backward(params, kept[place], slope, found, first=place == learning)
        if of_hidden is not None and place > learning:
            slope, of_hidden = slope + of_hidden, None
    return found
