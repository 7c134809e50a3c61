"""Which parameters are trained: all, some by name, or low-rank adapters beside frozen ones.

A matrix W (rows, columns) with an adapter acts as W + (α/r)·L·R with L (rows, r) and R (r, columns), which is
never formed in training (Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021, equation 3).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.models import HeadedModel
from lossworks.specs import RunSpec
from lossworks.specs.optimisation import LoraSpec
from lossworks.training.optimizer import OBJECTIVE

_LEFT, _RIGHT = "lora_left", "lora_right"
_SHOWN = 8  # names in a message


def equip(model: HeadedModel, spec: RunSpec, objective: Objective) -> None:
    """Freeze what a run doesn't train, add adapters, and make the losses part of what is trained.

    Args:
        model: Before it is distributed; changed in place.
        spec: The run.
        objective: Its losses.

    Raises:
        UserError: A pattern fits no parameter or layer, or the rank is larger than a matrix.
    """
    if spec.optimizer.only:
        _freeze_others(model, spec.optimizer.only)
    if spec.lora.rank:
        add_adapters(model, spec.lora, spec.seed)
    objective.fit_to(model)
    model.attach(OBJECTIVE, objective)


def add_adapters(model: HeadedModel, lora: LoraSpec, seed: int) -> None:
    """Put adapters beside the matrices of linear layers in a model's blocks, and freeze everything else.

    Args:
        model: Changed in place; it gives the same outputs as before, since the outer factor is 0.
        lora: Rank, scale and layers.
        seed: Of the inner factors.

    Raises:
        UserError: No layer fits, or the rank is larger than a matrix.
    """
    model.requires_grad_(False)
    chosen = list(_chosen_layers(model, lora.layers))
    generator = torch.Generator().manual_seed(seed)
    for name, layer in chosen:
        weight = layer.get_parameter("weight")
        rows, columns = weight.shape
        if lora.rank > min(rows, columns):
            raise UserError(
                f"lora.rank={lora.rank}: is larger than {name}, a matrix of {rows} x {columns}; it must be "
                f"at most {min(rows, columns)}"
            )
        inwards = not isinstance(layer, nn.Linear)  # a matrix that rows are multiplied by, not its transpose
        outer, inner = (rows, columns) if not inwards else (columns, rows)
        drawn = torch.empty(inner, lora.rank)
        # As PyTorch draws a linear layer, and as the paper's code does.
        bound = 1 / math.sqrt(inner)
        drawn.uniform_(-bound, bound, generator=generator)
        drawn, zeros = drawn.to(weight), weight.new_zeros(lora.rank, outer)
        left, right = (drawn, zeros) if inwards else (zeros.T.contiguous(), drawn.T.contiguous())
        layer.register_parameter(_LEFT, nn.Parameter(left))
        layer.register_parameter(_RIGHT, nn.Parameter(right))
        layer.register_forward_hook(_Added(lora.scale, inwards))


class _Added:
    """Adds what an adapter gives to what a layer gives.

    Args:
        scale: α/r.
        inwards: Whether the layer multiplies by its matrix, and not by the transpose.
    """

    def __init__(self, scale: float, inwards: bool) -> None:
        self._scale, self._inwards = scale, inwards

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        # By name, since functional calls put tensors there that are no parameters.
        left, right = getattr(layer, _LEFT), getattr(layer, _RIGHT)
        within, out = (left, right) if self._inwards else (right.T, left.T)
        found: Tensor = output + self._scale * ((inputs[0] @ within) @ out)
        return found


def merged(state: Mapping[str, Tensor], lora: LoraSpec) -> dict[str, Tensor]:
    """Return a model's state with adapters added into the matrices that they stand beside.

    Args:
        state: Tensors by name; without adapters it is returned as it is.
        lora: By which it was trained.
    """
    found = {name: value for name, value in state.items() if not name.endswith((_LEFT, _RIGHT))}
    for name, left in state.items():
        if name.endswith(_LEFT):
            layer = name.removesuffix(_LEFT)
            weight, right = found[f"{layer}weight"], state[f"{layer}{_RIGHT}"]
            change = lora.scale * (left.double() @ right.double())
            found[f"{layer}weight"] = (weight.double() + change).to(weight.dtype)
    return found


def _chosen_layers(model: HeadedModel, patterns: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers of a model's blocks that fit one of the patterns, with their names."""
    inside = {id(module) for block in model.blocks() for module in block.modules()}
    every = [
        (name, module)
        for name, module in model.named_modules()
        if id(module) in inside and _is_linear(module)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in every):
            raise UserError(
                f"lora.layers: {pattern!r} fits no linear layer; there are {_listed([n for n, _ in every])}"
            )
    if not every:
        raise UserError("lora: the model's blocks have no linear layers")
    for name, module in every:
        if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: torch's, or that of GPT-2 in transformers."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _freeze_others(model: nn.Module, patterns: Sequence[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"optimizer.only: {pattern!r} fits no parameter; there are {_listed(names)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
