"""What callers pass: checked, with the message a caller needs, and brought into one form."""

import numbers
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lossworks.adapters.torch_private import transformed
from lossworks.errors import UserError
from lossworks.head.core.low_rank import Frozen, beside_frozen
from lossworks.head.core.vocab_parallel import Shard, VocabParallel, agree

Reduction = Literal["mean", "sum", "none"]
Implementation = Literal["auto", "cpu", "triton", "reference"]
# Of which float32 holds the inverse, too.
_LEAST, _MOST = 1e-37, 1e37
IMPLEMENTATIONS = ("auto", "cpu", "triton", "reference")


@dataclass(frozen=True)
class Options:
    """What a caller chose, of plain values; see :func:`linear_cross_entropy`.

    Raises:
        UserError: A value is out of its range.
    """

    softcap: float | None = None
    ignore_index: int = -100
    temperature: float = 1.0
    filter_eps: float | str | None = None
    filter_repair: bool = True
    accumulate: str = "fp32"
    impl: str = "auto"
    buffer_share: float = 0.05
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "buffer_share"):
            check_number(name, getattr(self, name))
        for name in ("softcap", "filter_eps"):
            if getattr(self, name) not in (None, "auto"):
                check_number(name, getattr(self, name))
        check_integer("ignore_index", self.ignore_index)
        check_choice("impl", self.impl, IMPLEMENTATIONS)
        check_choice("accumulate", self.accumulate, ("fp32", "input"))
        if self.softcap is not None and not _LEAST <= self.softcap <= _MOST:
            raise UserError(
                f"softcap={self.softcap} must be positive and finite in float32, or None for no cap"
            )
        if not _LEAST <= self.temperature <= _MOST:
            raise UserError(f"temperature={self.temperature} must be positive and finite in float32")
        if not 0 < self.buffer_share <= 1:
            raise UserError(f"buffer_share={self.buffer_share} must be above 0 and at most 1")
        if not isinstance(self.batch_invariant, bool):
            raise UserError(f"batch_invariant={self.batch_invariant!r} must be True or False")
        eps = self.filter_eps
        if eps not in (None, "auto") and (isinstance(eps, str) or not 0 <= eps < 1):
            raise UserError(f"filter_eps={eps!r} must be in [0, 1), None for the exact gradient, or 'auto'")

        if self.batch_invariant and (eps not in (None, "auto") or self.impl == "reference"):
            name = "impl='reference'" if self.impl == "reference" else f"filter_eps={eps}"
            raise UserError(f"batch_invariant=True can't be combined with {name}, which looks at other rows")

    @property
    def eps(self) -> float | None:
        """The filter's threshold, or None for the exact gradient."""
        return None if self.filter_eps in (None, "auto") else float(self.filter_eps)


class Operands(NamedTuple):
    """Plain tensors that stand for what was passed.

    Attributes:
        e: Shape (N, D).
        c: Shape (V, D), this rank's classes.
        bias: Shape (V,), or None.
        group: Name of the process group that holds C together, or None.
        reduce_e: Whether ∂E is to be summed over it.
        dtype: In which the products' operands are taken: autocast's, or the inputs' own.
        frozen: The classifier's columns before those of ``c``, see :mod:`lossworks.head.core.low_rank`.
    """

    e: Tensor
    c: Tensor
    bias: Tensor | None
    group: str | None
    reduce_e: bool
    dtype: torch.dtype
    frozen: Frozen | None = None

    def classes(self, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Return some classes' rows of the whole classifier, (B, D) or (…, D), in a dtype, differentiable."""
        own = self.c[index] if isinstance(index, slice) else F.embedding(index, self.c)
        return beside_frozen(own.to(dtype), self.frozen, index)


def operands(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    vocab_parallel: VocabParallel | dist.ProcessGroup | None,
    frozen: Frozen | None = None,
) -> Operands:
    """Check E, C and the bias, and take distributed ones apart.

    Args:
        e: Shape (..., D); a DTensor must be replicated.
        c: Shape (V, D); a DTensor must be sharded by classes, or replicated.
        bias: Shape (V,), placed like ``c``, or None.
        vocab_parallel: The group over whose ranks classes are spread, or None.
        frozen: Columns of the classifier before those of ``c``, or None.

    Raises:
        UserError: Shapes, dtypes, devices or placements do not fit together.
    """
    if isinstance(vocab_parallel, dist.ProcessGroup):
        vocab_parallel = VocabParallel(vocab_parallel)
    if not isinstance(vocab_parallel, VocabParallel | None):
        raise UserError(f"vocab_parallel={vocab_parallel!r} must be a process group, a VocabParallel or None")
    if _is_distributed(c):
        c, bias, vocab_parallel = _local_classes(c, bias, vocab_parallel)
    if _is_distributed(e):
        e = _local_rows(e)
    _check(e, c, bias, frozen, parallel=vocab_parallel is not None)
    device = e.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not autocast and e.dtype != c.dtype:
        raise UserError(f"e is {e.dtype} and c is {c.dtype}; they must agree, or run under torch.autocast")
    dtype = torch.get_autocast_dtype(device) if autocast and e.dtype != torch.float64 else e.dtype
    group = None if vocab_parallel is None else vocab_parallel.group.group_name
    reduce_e = vocab_parallel is None or vocab_parallel.reduce_e
    return Operands(e.reshape(e.shape[:-1].numel(), e.shape[-1]), c, bias, group, reduce_e, dtype, frozen)


def in_full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, on devices that have none as well."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def all_classes(head: Operands) -> int:
    """Return V over all ranks, each of which must call."""
    return len(head.c) if head.group is None else Shard.of(head.group, len(head.c), head.c.device).classes


def _check(e: Tensor, c: Tensor, bias: Tensor | None, frozen: Frozen | None, *, parallel: bool) -> None:
    before = 0 if frozen is None else frozen.values.shape[1]
    if e.dim() < 1 or c.dim() != 2 or e.shape[-1] != before + c.shape[1]:
        raise UserError(f"e {tuple(e.shape)} and c {tuple(c.shape)} must be (..., D) and (V, D)")
    if c.shape[0] == 0 and not parallel:
        raise UserError("c has no class: V must be at least 1")
    if bias is not None and bias.shape != c.shape[:1]:
        raise UserError(f"bias {tuple(bias.shape)} must be ({c.shape[0]},), one number a class")
    if not e.is_floating_point() or not c.is_floating_point():
        raise UserError(f"e is {e.dtype} and c is {c.dtype}; both must be floating point")
    if bias is not None and not bias.is_floating_point():
        raise UserError(f"bias is {bias.dtype}; it must be floating point")
    for name, tensor in (("c", c), ("bias", bias), ("c.weight", None if frozen is None else frozen.values)):
        if tensor is not None and tensor.device != e.device:
            raise UserError(f"{name} is on {tensor.device}, but e is on {e.device}; move one of them")


def require_tensors(**given: Tensor | None) -> None:
    """Refuse what is no dense tensor, as lists, arrays of numpy and sparse tensors are.

    Raises:
        UserError: Naming it.
    """
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise UserError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
        if value.layout != torch.strided:
            raise UserError(f"{name} is {value.layout}; it must be dense: to_dense() makes it so")
        if value.is_floating_point() and value.dtype.itemsize == 1:
            raise UserError(f"{name} is {value.dtype}, which has no products of its own; convert it first")


def usable_impl(impl: Implementation, *tensors: Tensor | None) -> Implementation:
    """Return how a head can be computed: inside transforms of ``torch.func`` with its logits.

    They are those of one example under ``vmap``, as gradients of single examples need them.

    Raises:
        UserError: Kernels are asked for there.
    """
    if not transformed(*tensors):
        return impl
    if impl in ("cpu", "triton"):
        raise UserError(f"impl={impl!r} is not for torch.func's transforms; use auto or reference")
    return "reference"


def check_parallel(group: str | None, impl: str) -> None:
    """Refuse the dense reference where the classes are spread over ranks.

    Raises:
        UserError: It is asked for.
    """
    if group is not None and impl == "reference":
        raise UserError("impl='reference' can't be combined with vocab_parallel: it builds all the logits")


def check_targets(e: Tensor, targets: Tensor, classes: int, *, soft: bool) -> None:
    """Check the shape, dtype and device of targets; their values are checked where they are used.

    Raises:
        UserError: They do not fit to ``e``.
    """
    shape = (*e.shape[:-1], classes) if soft else tuple(e.shape[:-1])
    if tuple(targets.shape) != shape:
        kind = "soft targets" if soft else "targets"
        raise UserError(f"{kind} {tuple(targets.shape)} must have the shape {shape}")
    if not soft and targets.dtype != torch.int64:
        raise UserError(f"targets are {targets.dtype}; they must be torch.int64 class indices")
    if targets.device != e.device:
        raise UserError(f"targets are on {targets.device}, but e is on {e.device}; move one of them")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        UserError: It names them.
    """
    if value not in choices:
        raise UserError(f"{name}={value!r} must be one of {', '.join(choices)}")


def check_number(name: str, value: object) -> None:
    """Refuse what is no number: a tensor, whose gradient would be lost, among others.

    Raises:
        UserError: It is none.
    """
    if isinstance(value, Tensor):
        raise UserError(
            f"{name} is a Tensor {tuple(value.shape)}; it must be a number. A temperature that is learnt, "
            "or one a row, is LogSumExp(temperature) of linear_row_statistics"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{name}={value!r} must be a number")


def check_integer(name: str, value: object) -> None:
    """Refuse what is no whole number.

    Raises:
        UserError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UserError(f"{name}={value!r} must be a whole number")


def check_finite(head: Operands) -> None:
    """Refuse NaN and infinities.

    Raises:
        UserError: It names the first row that holds one; with classes spread over ranks it is raised on all.
    """
    found = (_not_finite(name, x) for name, x in (("e", head.e), ("c", head.c), ("bias", head.bias)))
    complaint = agree(next((text for text in found if text), None), head.group, head.e.device)
    if complaint:
        raise UserError(complaint)


def _not_finite(name: str, tensor: Tensor | None) -> str | None:
    if tensor is None or bool(tensor.isfinite().all()):
        return None
    bad = ~tensor.detach().isfinite().reshape(len(tensor), -1).all(1)
    return f"{name} holds NaN or infinity, first in row {int(bad.nonzero()[0])} of {len(tensor)}"


def shifted(rows: Tensor, targets: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Pair row t with target t + shift along the sequence.

    Args:
        rows: What belongs to rows, shape (..., T) or (..., T, D).
        targets: Shape (..., T).
        shift: 0 ≤ shift < T.

    Returns:
        ``rows`` without the last ``shift`` of a sequence, and the targets without the first.

    Raises:
        UserError: The shift is out of range.
    """
    check_integer("shift", shift)
    length = targets.shape[-1] if targets.dim() else 0
    if not 0 <= shift < length:
        raise UserError(f"shift={shift} must be at least 0 and less than the {length} targets of a sequence")
    return rows.narrow(targets.dim() - 1, 0, length - shift), targets[..., shift:]


def _is_distributed(tensor: Tensor | None) -> bool:
    # By name, since importing DTensor costs time that most callers need not spend.
    return type(tensor).__name__ == "DTensor"


def _local_classes(
    c: Tensor, bias: Tensor | None, vocab_parallel: VocabParallel | None
) -> tuple[Tensor, Tensor | None, VocabParallel | None]:
    """Take a classifier that is sharded by classes, or replicated, apart."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    for name, tensor in (("c", c), ("bias", bias)):
        if not isinstance(tensor, DTensor):
            continue
        if tensor.device_mesh.ndim != 1 or tensor.placements[0] not in (Shard(0), Replicate()):
            raise UserError(
                f"{name} is a DTensor placed as {tensor.placements} on {tensor.device_mesh.ndim} mesh "
                "dimensions; it must be Shard(0) or Replicate() on one"
            )
    if not isinstance(c, DTensor):
        raise UserError("bias is a DTensor and c is not; they must be placed alike")
    if bias is not None and (not isinstance(bias, DTensor) or bias.placements != c.placements):
        raise UserError("bias must be a DTensor placed like c")
    if c.placements[0] == Shard(0) and vocab_parallel is None:
        vocab_parallel = VocabParallel(c.device_mesh.get_group())
    return c.to_local(), None if bias is None else bias.to_local(), vocab_parallel


def _local_rows(e: Tensor) -> Tensor:
    """Take replicated embeddings apart."""
    from torch.distributed.tensor import DTensor, Replicate

    if isinstance(e, DTensor) and all(placement == Replicate() for placement in e.placements):
        return e.to_local()
    placements = e.placements if isinstance(e, DTensor) else None
    raise UserError(
        f"e is a DTensor placed as {placements}; it must be replicated: e.full_tensor() gathers it"
    )
