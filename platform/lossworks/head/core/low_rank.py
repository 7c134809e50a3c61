"""A classifier of which a low-rank part is trained: C + s·B·A, never formed (Hu et al., *LoRA*, ICLR 2022).

The logits are E·Cᵀ + s·(E·Aᵀ)·Bᵀ. The implementations see features [E, s·E·Aᵀ], shape (N, D + r), and a
classifier [C, B], shape (V, D + r), of which they put together one block of classes at a time; only the
columns of B have a gradient there, and that of A is autograd's through the features.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.errors import UserError

_INT8 = 127


@dataclass(frozen=True, eq=False)
class QuantizedClassifier:
    """A frozen classifier in eight bits: C_k is scale_k·values_k, a quarter of float32's memory.

    Attributes:
        values: Shape (V, D), int8.
        scale: Shape (V,), float32.
    """

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, c: Tensor) -> "QuantizedClassifier":
        """Return a classifier (V, D) rounded to 255 steps between −max|C_k| and max|C_k| of each class."""
        wide = c.detach().float()
        scale = wide.abs().amax(1) / _INT8
        steps = wide / torch.where(scale > 0, scale, 1)[:, None]
        return cls(steps.round().to(torch.int8), scale)


@dataclass(frozen=True, eq=False)
class LowRankClassifier:
    """C + s·B·A in the place of ``c``: C is frozen, and A and B are what has gradients.

    Over ranks that hold the classes together (``vocab_parallel``), C and B are spread alike and A is whole on
    every rank.

    Attributes:
        weight: C, shape (V, D), without a gradient, or a :class:`QuantizedClassifier`.
        a: A, shape (r, D), 1 ≤ r ≤ D; None where the features come as [E, s·E·Aᵀ], shape (..., D + r),
            already, as they must where A is applied to something else than E, such as E after dropout.
        b: B, shape (V, r).
        scale: s; LoRA's α/r.
    """

    weight: Tensor | QuantizedClassifier
    a: Tensor | None
    b: Tensor
    scale: float = 1.0

    def __len__(self) -> int:
        return len(self.b)

    def formed(self) -> Tensor:
        """Return C + s·B·A, shape (V, D), as it is where the two are merged.

        Raises:
            UserError: There is no A.
        """
        if self.a is None:
            raise UserError("c.a is None: it must be a torch.Tensor to form the classifier")
        c = Frozen.of(self.weight).rows(slice(None), self.b.dtype)
        return c + self.scale * self.b @ self.a


class Frozen(NamedTuple):
    """The columns of a classifier that are not trained.

    Attributes:
        values: Shape (V, D), floating point, or int8 with a scale.
        scale: Shape (V,), or None.
    """

    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, weight: "Tensor | QuantizedClassifier") -> "Frozen":
        """Return them as two tensors."""
        return cls(weight) if isinstance(weight, Tensor) else cls(weight.values, weight.scale)

    def rows(self, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Return some classes (B, D), or (…, D) of an index (…), in a dtype."""
        part = self.values[index]
        if self.scale is None:
            return part.to(dtype)
        return (part.to(torch.float32) * self.scale[index][..., None]).to(dtype)


def frozen_of(values: Tensor | None, scale: Tensor | None) -> Frozen | None:
    """Return the two tensors of frozen columns as one, for operators take only tensors; None for None."""
    return None if values is None else Frozen(values, scale)


def beside_frozen(own: Tensor, frozen: Frozen | None, index: slice | Tensor) -> Tensor:
    """Return classes' own columns (…, r) with the frozen ones of the same classes before them, (…, D)."""
    return own if frozen is None else torch.cat([frozen.rows(index, own.dtype), own], -1)


def taken_apart(e: Tensor, c: "Tensor | LowRankClassifier") -> tuple[Tensor, Tensor, Frozen | None]:
    """Return the features (..., D + r), B and the frozen C of a low-rank classifier; others as they are.

    Raises:
        UserError: Something in it is no tensor or has another shape, r is out of range, or C has a gradient.
    """
    if not isinstance(c, LowRankClassifier):
        return e, c, None
    frozen = Frozen.of(c.weight)
    _check(e, c, frozen)
    if c.a is None:
        return e, c.b, frozen
    low = F.linear(e, c.a) * c.scale
    return torch.cat([e, low.to(e.dtype)], -1), c.b, frozen


def _check(e: Tensor, c: LowRankClassifier, frozen: Frozen) -> None:
    given = {"e": e, "c.weight": frozen.values, "c.a": e if c.a is None else c.a, "c.b": c.b}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
        if type(value).__name__ == "DTensor":
            raise UserError(f"{name} is a DTensor; pass its local part and vocab_parallel")
    if frozen.values.dim() != 2:
        raise UserError(f"c.weight {tuple(frozen.values.shape)} must be (V, D)")
    v, d = frozen.values.shape
    rank = c.b.shape[-1] if c.b.dim() else 0
    if c.b.shape != (v, rank) or not 1 <= rank <= d:
        raise UserError(f"c.b {tuple(c.b.shape)} must be ({v}, r) with a rank r in [1, {d}]")
    if c.a is not None and c.a.shape != (rank, d):
        raise UserError(f"c.a {tuple(c.a.shape)} must be ({rank}, {d})")
    width = d if c.a is not None else d + rank
    if e.dim() < 1 or e.shape[-1] != width:
        raise UserError(f"e {tuple(e.shape)} must be (..., {width}), as c has {d} features and rank {rank}")
    _check_frozen(frozen, v)


def _check_frozen(frozen: Frozen, classes: int) -> None:
    values, scale = frozen
    if values.requires_grad:
        raise UserError("c.weight requires a gradient; only a and b are trained: use its detach()")
    if scale is None and not values.is_floating_point():
        raise UserError(f"c.weight is {values.dtype}; it must be floating point, or a QuantizedClassifier")
    if scale is not None and (values.dtype != torch.int8 or scale.shape != (classes,)):
        raise UserError(
            f"c.weight holds values {values.dtype} and a scale {tuple(scale.shape)}; they must be torch.int8 "
            f"and ({classes},)"
        )
