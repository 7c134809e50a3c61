"""torch besides its documented interface: kernels for many tensors at once, groups, storages, subclasses."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "TorchDispatchMode",
    "add_scaled",
    "drops_at_random",
    "fused_adamw",
    "keeps_statistics",
    "memory_format_enum",
    "of_shape_alone",
    "past_torch_function",
    "process_group",
    "storage_key",
    "transformed",
    "tree_leaves",
    "tree_map_only",
    "without_values",
]

Subclass = TypeVar("Subclass", bound=Tensor)


def add_scaled(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: float) -> None:
    """Add to each tensor, in place, another one times a factor."""
    torch._foreach_add_(list(tensors), list(others), alpha=factor)


def transformed(*tensors: Tensor | None) -> bool:
    """Return whether a tensor is inside a transform of ``torch.func``, such as ``vmap`` or ``grad``.

    While torch compiles it is not asked: its tracer does not know this function.
    """
    if torch.compiler.is_compiling():
        return False
    given = (tensor for tensor in tensors if tensor is not None)
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in given)


def without_values(*tensors: Tensor | None) -> bool:
    """Return whether tensors hold no numbers to look at: torch compiles or exports, or they are fake or meta.

    Fake ones are told by name, since importing their class costs time that most callers need not spend.
    """
    if torch.compiler.is_compiling():
        return True
    given = [tensor for tensor in tensors if tensor is not None]
    return any(tensor.is_meta or type(tensor).__name__ == "FakeTensor" for tensor in given)


def fused_adamw(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> None:
    """Take a step of AdamW in place: parameters and both moments, which are in the same order.

    Args:
        params: Any shapes.
        gradients: Contiguous, shaped like the parameters.
        first: First moments.
        second: Second moments.
        step: Steps taken with this one, a scalar, of all.
        lr: Learning rate.
        betas: Decay of the moments.
        weight_decay: Decoupled decay.
        eps: Added to the root of the second moment.
    """
    torch._fused_adamw_(
        list(params),
        list(gradients),
        list(first),
        list(second),
        [],
        [step] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def of_shape_alone(
    kind: type[Subclass], shape: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> Subclass:
    """Return a tensor of a subclass that has a shape and no values."""
    return Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)


def past_torch_function() -> AbstractContextManager[Any]:
    """Return a context in which functions take tensors of subclasses as they take others."""
    return torch._C.DisableTorchFunctionSubclass()


def process_group(name: str) -> dist.ProcessGroup:
    """Return a process group by its ``group_name``, which operators can take where they can't take groups."""
    return _resolve_process_group(GroupName(name))


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return what tells a storage from all others that there are now."""
    return int(storage._cdata)


def drops_at_random(module: nn.Module) -> bool:
    """Return whether a module is a dropout of any number of dimensions that drops something."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def keeps_statistics(module: nn.Module) -> bool:
    """Return whether a module is a batch normalisation of any number of dimensions."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def memory_format_enum() -> Any:
    """Return the enum that a distributed checkpoint's table of contents holds for memory formats."""
    from torch.distributed.checkpoint import metadata

    return metadata._MEM_FORMAT_ENCODING
