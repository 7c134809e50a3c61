"""The layer that makes a model's logits: a plain linear one, or one with LoRA adapters of PEFT around it."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lossworks.errors import UserError
from lossworks.head import LowRankClassifier

HeadClassifier = Tensor | LowRankClassifier
"""C, shape (V, D), or with adapters C + B·A for features that hold E·Aᵀ already."""


class DeferringHead:
    """What is mixed into the class of a head: it hands on features while nobody needs its logits."""

    deferring = False

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits (..., V) of features (..., D), or what the classifier makes them of."""
        if self.deferring:
            return _with_adapters(features, self)
        found: Tensor = super().forward(features, *args, **kwargs)  # type: ignore[misc]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle it as a layer of its library that defers again where it is read."""
        return _blank, (stock_class(self),), vars(self)


def defer(head: nn.Module, model: str) -> DeferringHead:
    """Change the class of a layer, unless that was done, to one that can hand on its features.

    Raises:
        UserError: Its output isn't that of one matrix, with or without adapters; ``model`` is named.
    """
    reason = why_not_linear(head)
    if reason is not None:
        raise UserError(f"{model}: {reason}")
    found: Any = head
    if not isinstance(head, DeferringHead):
        found.__class__ = _deferring_class(found.__class__)
    return found  # type: ignore[no-any-return]


def stock_class(head: Any) -> type[nn.Module]:
    """Return the class of a layer as its library made it."""
    found: type[nn.Module] = type(head).__mro__[2] if isinstance(head, DeferringHead) else type(head)
    return found


def classifier_of(features: Tensor, head: Any) -> tuple[Tensor, HeadClassifier, Tensor | None]:
    """Return features (..., D) that were handed on as the classifier takes them, it and its bias."""
    layer, active = _layer(head), _active(head)
    weight: HeadClassifier = layer.weight
    dtype = layer.weight.dtype
    if active:
        b = torch.cat([head.lora_B[name].weight for name in active], 1)
        weight, dtype = LowRankClassifier(layer.weight.detach(), None, b), b.dtype
    # Models that go on in another dtype cast them.
    autocast = torch.is_autocast_enabled(features.device.type)
    return features if autocast else features.to(dtype), weight, layer.bias


def why_not_linear(head: nn.Module) -> str | None:
    """Return why a layer's output is no product with one matrix, or one with adapters; None if it is."""
    if stock_class(head) is nn.Linear:
        return None
    if _adapted(head):
        return _unusable_adapters(head)
    kind = f"{type(head).__module__.partition('.')[0]}.{type(head).__name__}"
    return (
        f"its head is a {kind} and must be a plain torch.nn.Linear, or one with LoRA adapters of PEFT; else "
        "leave the head out of target_modules and modules_to_save"
    )


def _with_adapters(features: Tensor, head: Any) -> Tensor:
    """Return [E, s·E·Aᵀ], shape (..., D + r), of all active adapters; E where there is none."""
    parts = [features]
    for name in _active(head):
        a = head.lora_A[name]
        parts.append(head.scaling[name] * a(head.lora_dropout[name](features.to(a.weight.dtype))))
    return torch.cat(parts, -1) if len(parts) > 1 else features


def _layer(head: Any) -> Any:
    return head.get_base_layer() if _adapted(head) else head


def _active(head: Any) -> list[str]:
    """Return the names of the adapters that a head applies."""
    if not _adapted(head) or head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _adapted(head: Any) -> bool:
    """Return whether a layer is PEFT's around a linear one; by name: PEFT need not be installed."""
    kind = stock_class(head)
    return kind.__module__.startswith("peft.") and kind.__name__ == "Linear" and hasattr(head, "lora_A")


def _unusable_adapters(head: Any) -> str | None:
    base = head.get_base_layer()
    if stock_class(base) is not nn.Linear:
        return f"its head has adapters around a {type(base).__name__}, which must be a torch.nn.Linear"
    if head.lora_variant:
        return f"its head's adapters ({', '.join(head.lora_variant)}) must be plain LoRA"
    if any(layer.bias is not None for layer in head.lora_B.values()):
        return "its head's adapters have a bias: set lora_bias=False"
    if base.weight.requires_grad and _active(head):
        return "its head has adapters, and its own weight is trained as well: freeze it"
    return None


@functools.cache
def _deferring_class(stock: Any) -> type[nn.Module]:
    named = {"__module__": stock.__module__, "__doc__": stock.__doc__}
    return type(stock.__name__, (DeferringHead, stock), named)


def _blank(stock: Any) -> nn.Module:
    """Return a deferring layer without anything in it, to be filled."""
    kind: Any = _deferring_class(stock)
    found: nn.Module = kind.__new__(kind)
    return found
