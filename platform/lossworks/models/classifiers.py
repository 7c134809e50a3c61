"""Small classifiers: a multi-layer perceptron, a convolutional network, a ResNet with GroupNorm.

Shapes: B examples; an example is a vector (F), a signal (C, L) or an image (C, H, W); D features, K classes.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from lossworks.errors import UserError
from lossworks.models.interface import Head, HeadedModel
from lossworks.specs import ClassifierModelSpec

_STAGES = 3  # of a ResNet; each but the first halves the sides and doubles the channels


class Classifier(HeadedModel):
    """Blocks one after the other, a mean over positions, and a linear head.

    No layer looks at other examples of a batch (GroupNorm instead of BatchNorm), so that micro-batches, ranks
    and federated clients compute the same function.

    Args:
        blocks: Applied in order; the last gives (B, D) or (B, D, positions…).
        features: D.
        classes: K.
        dropout: Share of features set to zero before the head, in training.
    """

    def __init__(self, blocks: list[nn.Module], features: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(features, classes)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the features (B, D) of examples (B, …)."""
        x = inputs
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.dropout(x if x.dim() == 2 else x.flatten(2).mean(2))
        return found

    def head(self) -> Head:
        """Return the head with its bias."""
        return Head(self.classifier.weight, self.classifier.bias)

    def blocks(self) -> list[nn.Module]:
        """Return the layers in order."""
        return list(self.layers)

    def checkpoint_activations(self) -> None:
        """Refuse: these models are small.

        Raises:
            UserError: Always.
        """
        raise UserError("activation_checkpointing=true is for language models")


class _Residual(nn.Module):
    """Two convolutions beside a shortcut, with GroupNorm before the activations."""

    def __init__(self, conv: type[nn.Conv1d | nn.Conv2d], into: int, out: int, groups: int) -> None:
        super().__init__()
        stride = 1 if into == out else 2
        self.first = conv(into, out, 3, stride, 1, bias=False)
        self.second = conv(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, out) for _ in range(2))
        self.shortcut = nn.Identity() if into == out else conv(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norms[0](self.first(x)))
        return functional.relu(self.norms[1](self.second(y)) + self.shortcut(x))


def build_classifier(
    spec: ClassifierModelSpec, *, shape: tuple[int, ...], classes: int, seed: int
) -> Classifier:
    """Return the classifier that ``spec`` describes, in float32 on the CPU and in training mode.

    The same seed gives bit-identical parameters, and the global random state is left as it was.

    Args:
        spec: What to build.
        shape: Of one example: (F), (C, L) or (C, H, W).
        classes: K.
        seed: Seed of the initial parameters.

    Raises:
        UserError: A convolution is to read what is neither a signal nor an image.
    """
    if spec.kind != "mlp" and len(shape) not in (2, 3):
        what = f"{shape[0]} features" if len(shape) == 1 else f"shape {shape}"
        raise UserError(f"model.kind={spec.kind} reads signals and images; examples of {what} need mlp")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks, features = {"mlp": _mlp, "cnn": _cnn, "resnet": _resnet}[spec.kind](spec, shape)
        return Classifier(blocks, features, classes, spec.dropout)


def _mlp(spec: ClassifierModelSpec, shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    sizes = [torch.Size(shape).numel(), *[spec.width] * spec.layers]
    layers = [nn.Sequential(nn.Flatten(), nn.Linear(into, out), nn.ReLU()) for into, out in pairwise(sizes)]
    return [*layers] or [nn.Sequential(nn.Flatten())], sizes[-1]


def _cnn(spec: ClassifierModelSpec, shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    conv = _convolution(shape)
    channels = [shape[0], *[spec.width] * spec.layers]
    layers: list[nn.Module] = []
    side = min(shape[1:])
    for into, out in pairwise(channels):
        stride = 2 if side >= 8 else 1  # halved while there is something left to halve
        side //= stride
        layers.append(nn.Sequential(conv(into, out, 3, stride, 1), nn.ReLU()))
    return layers, spec.width


def _resnet(spec: ClassifierModelSpec, shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    conv = _convolution(shape)
    stem = nn.Sequential(
        conv(shape[0], spec.width, 3, 1, 1, bias=False), nn.GroupNorm(spec.groups, spec.width), nn.ReLU()
    )
    layers: list[nn.Module] = [stem]
    into = spec.width
    for stage in range(_STAGES):
        out = spec.width * 2**stage
        for _ in range(spec.layers):
            layers.append(_Residual(conv, into, out, spec.groups))
            into = out
    return layers, into


def _convolution(shape: tuple[int, ...]) -> type[nn.Conv1d | nn.Conv2d]:
    return nn.Conv1d if len(shape) == 2 else nn.Conv2d
