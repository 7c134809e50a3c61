"""torch besides its documented interface: kernels for many tensors at once, groups, storages, subclasses."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
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
    "assumed_tensors",
    "drops_at_random",
    "fused_adamw",
    "keeps_statistics",
    "memory_format_enum",
    "of_shape_alone",
    "past_torch_function",
    "pretended_ranks",
    "process_group",
    "storage_key",
    "transformed",
    "tree_leaves",
    "tree_map_only",
    "without_values",
]

Subclass = TypeVar("Subclass", bound=Tensor)

_ASSUMING: ContextVar[bool] = ContextVar("assuming", default=False)


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

    Inside :func:`assumed_tensors` every look is answered, so there it is false. Fake ones are told by name,
    since importing their class costs time that most callers need not spend.
    """
    if torch.compiler.is_compiling():
        return True
    if _ASSUMING.get():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return any(tensor.is_meta or type(tensor).__name__ == "FakeTensor" for tensor in given)


def shapes_alone() -> bool:
    """Return whether this runs inside :func:`assumed_tensors`, where only shapes and memory count."""
    return _ASSUMING.get()


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; those of inference mode aren't counted."""
    return 0 if tensor.is_inference() else tensor._version


class _Assuming(TorchDispatchMode):
    """Answers whoever looks at the values of fake tensors as when every row counts and nothing is wrong.

    ``all`` is true and other booleans are false; floats are 1 and integers 0, unless torch knows them; of
    what is looked for in a tensor, there is as much as there can be.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, or say what it would have said of values."""
        del types
        aten = torch.ops.aten
        given: Any = args[0] if args else None
        if func is aten._local_scalar_dense.default and getattr(given, "constant", None) is None:
            return getattr(given, "assumed", 1.0 if given.is_floating_point() else 0)
        if func is aten.nonzero.default:
            return given.new_empty((given.numel(), given.dim()), dtype=torch.int64)
        if func is aten._unique2.default:
            places = [given.new_empty(size, dtype=torch.int64) for size in (given.shape, given.numel())]
            return given.new_empty(given.numel()), *places
        if func is aten.bincount.default:
            return _bins(*args, **(kwargs or {}))
        if func is aten.index.Tensor:
            args = (given, [place for index in args[1] for place in _places(index)])
        result = func(*args, **(kwargs or {}))
        if func is aten.all.default:
            result.assumed = True
        return result


def _bins(given: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """Return what ``torch.bincount`` does where no number is above those that there must be room for."""
    like = given if weights is None else weights
    return like.new_empty(minlength)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Return the indices that a mask stands for, all of them, and any other index as it is."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]


@contextmanager
def assumed_tensors() -> Iterator[None]:
    """Have all tensors that are made inside be fake: shape, dtype and device, and neither values nor memory.

    Code that looks at values goes the way that it goes when every row counts and nothing is wrong, so that
    what it takes on the way is that of a real run. Tensors from outside may be read.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    token = _ASSUMING.set(True)
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), _Assuming():
            # Copies of modules ask where their tensors lie, and do nothing with the answer.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            # Results of a model that nobody changes in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            yield
    finally:
        _ASSUMING.reset(token)


@contextmanager
def pretended_ranks(ranks: int) -> Iterator[None]:
    """Make this process rank 0 of so many that are not there: exchanges return at once, and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


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
