"""Tiles of logits, classes × rows, and the sums that are taken of them as they pass.

Tiles are transposed (a class is a row of memory): then a product with C needs no copy, columns that are left
out are contiguous, and ∂C of a block of classes is one product.
"""

import torch
from torch import Tensor

from lossworks.adapters.torch_private import shapes_alone
from lossworks.head.core.problem import LinearProblem, RowSums, Softmax


def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype in which matrix products of ``dtype`` are taken.

    On a CPU bfloat16 and float16 products pay only with matrix units (AMX). With bfloat16 dot products alone
    they were measured to be slower than float32 ones, which are exact products of the same numbers.
    """
    if device != "cpu" or dtype.itemsize >= 4:
        return dtype
    unit = "amx_bf16" if dtype == torch.bfloat16 else "amx_fp16"
    return dtype if torch.cpu.get_capabilities().get(unit) else torch.float32


def per_row(value: float | Tensor, rows: slice) -> float | Tensor:
    """Return a number as it is, and the part (T,) of a vector (N,) that belongs to ``rows``."""
    return value[rows] if isinstance(value, Tensor) else value


class Logits:
    """Computes tiles of logits; its operands are in the products' dtype.

    Args:
        problem: What to compute.
        dtype: The inputs are rounded to it first (autocast's dtype, or their own).
    """

    def __init__(self, problem: LinearProblem, dtype: torch.dtype) -> None:
        self.problem = problem
        self.products = product_dtype(dtype, problem.e.device.type)
        self.wide = torch.promote_types(self.products, torch.float32)
        self.e = problem.e.to(dtype).to(self.products)
        self.own_e = problem.own_e if self.e is problem.e else self.e[:, -problem.c.shape[1] :]
        self._dtype = dtype
        self._bias = None if problem.bias is None else problem.bias.to(self.wide)
        self._c: tuple[slice, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.e)

    @property
    def classes(self) -> int:
        """The number of classes V."""
        return len(self.problem.c)

    def c(self, block: slice) -> Tensor:
        """Return a block (B, D) of C in the products' dtype; the last one is remembered."""
        if self._c is None or self._c[0] != block:
            self._c = block, self.problem.classes(block, self._dtype).to(self.products)
        return self._c[1]

    def tile(self, block: slice, rows: slice, out: Tensor) -> Tensor:
        """Write the logits into ``out``, wide, shape (B, T), and return it."""
        return self.capped(self.uncapped(block, rows, out), block, rows, out)

    def uncapped(self, block: slice, rows: slice, out: Tensor) -> Tensor:
        """Write C·Eᵀ + b of a tile into ``out``, wide, shape (B, T), and return it."""
        c, e = self.c(block), self.e[rows]
        if self.products == self.wide:
            torch.mm(c, e.t(), out=out)
        else:
            out.copy_(c @ e.t())
        if self._bias is not None:
            out += self._bias[block, None]
        return out

    def capped(self, x: Tensor, block: slice, rows: slice, out: Tensor) -> Tensor:
        """Return the logits of what :meth:`uncapped` gave, (B, T), in ``out``; in ``x`` without a softcap."""
        z = x
        if self.problem.softcap is not None:
            z = torch.div(x, self.problem.softcap, out=out).tanh_().mul_(self.problem.softcap)
        if self.problem.target_offset is not None:
            hits = self.hits(block, rows)
            z[hits] += self.problem.target_offset[rows][hits[1]].to(z.dtype)
        return z

    def bend(self, x: Tensor) -> Tensor | None:
        """Return the softcap's derivative at what :meth:`uncapped` gave, (B, T), or None without a softcap.

        1 − tanh² cancels where the cap saturates; with t = exp(−2|x|/s) it is 4t/(1 + t)².
        """
        if self.problem.softcap is None:
            return None
        t = x.abs().mul_(-2 / self.problem.softcap).exp_()
        return (t + 1).square_().reciprocal_().mul_(t).mul_(4)

    def bounded(self, z: Tensor) -> Tensor:
        """Return finite logits, for a bias can make some −∞, and 0·∞ is no number."""
        return z if self._bias is None else z.clamp(min=torch.finfo(z.dtype).min)

    def hits(self, block: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Return where in a tile the targets lie: classes and rows, both (hits,), counted from its corner."""
        within = self.problem.targets[rows] - block.start
        row = ((within >= 0) & (within < block.stop - block.start)).nonzero().squeeze(1)
        return within[row], row

    def buffer(self, rows: int, classes: int) -> Tensor:
        """Return room, shape (classes · rows,), for a tile of at most so many rows and classes."""
        return self.e.new_empty(min(rows, len(self)) * min(classes, self.classes), dtype=self.wide)

    def soft(self, block: slice, rows: slice) -> Tensor | None:
        """Return the tile of soft targets, shape (B, T), or None if targets are classes."""
        q = self.problem.probabilities
        return None if q is None else q[rows, block].t().to(self.wide)


def slices(size: int, step: int) -> list[slice]:
    """Cut range(size) into parts of ``step``; one empty part if there is nothing to cut."""
    return [slice(start, min(start + step, size)) for start in range(0, max(size, 1), max(step, 1))]


def walked(parts: list[slice]) -> list[tuple[slice, int]]:
    """Return the slices to walk, each with how many it stands for: itself.

    Where tensors have shapes alone, as while a run is planned, one of equal slices between the first and the
    last stands for all: a head of a million rows has more tiles than anybody waits for.
    """
    if len(parts) <= 3 or not shapes_alone():
        return [(part, 1) for part in parts]
    return [(parts[0], 1), (parts[1], len(parts) - 2), (parts[-1], 1)]


def view(buffer: Tensor, block: slice, rows: slice) -> Tensor:
    """Return the beginning of a buffer as a contiguous tile, shape (B, T)."""
    shape = (block.stop - block.start, rows.stop - rows.start)
    return buffer[: shape[0] * shape[1]].view(shape)


class RunningSums:
    """The sums of a chunk's rows, taken tile by tile with a running maximum.

    Args:
        logits: Where tiles come from.
        softmax: Of which temperature and classes.
        rows: The chunk.
        expected: Whether Σ p z is wanted.
        totals: Whether Σ w z and Σ z² are wanted.
        predicted: Whether the class of the largest logit is wanted.
        weights: w, shape (V,), or None for 1.
    """

    def __init__(
        self,
        logits: Logits,
        softmax: Softmax,
        rows: slice,
        *,
        expected: bool,
        totals: bool,
        predicted: bool,
        weights: Tensor | None,
    ) -> None:
        self._logits, self._rows, self._softmax = logits, rows, softmax
        self._temperature = per_row(softmax.temperature, rows)
        self._weights = weights
        zeros = logits.e.new_zeros(rows.stop - rows.start, dtype=logits.wide)
        self._lowest = torch.finfo(logits.wide).min
        self._max = zeros + self._lowest
        self._sum, self._target = zeros, zeros.clone()
        self._expected = zeros.clone() if expected else None
        self._total = zeros.clone() if totals else None
        self._squares = zeros.clone() if totals else None
        self._largest = zeros - torch.inf if predicted else None
        self._predicted = torch.zeros_like(zeros, dtype=torch.int64) if predicted else None

    def add(self, z: Tensor, block: slice, scratch: Tensor) -> Tensor:
        """Take a tile in.

        Args:
            z: The tile, shape (B, T).
            block: Its classes.
            scratch: Of the same shape, gets exp(z/τ − m); it may be ``z`` where Σ p z is not wanted.

        Returns:
            m, shape (T,): the largest z/τ so far.
        """
        hits = self._logits.hits(block, self._rows)
        self._target[hits[1]] = z[hits]
        soft = self._logits.soft(block, self._rows)
        if soft is not None:
            self._target += torch.linalg.vecdot(soft, z, dim=0)
        if self._total is not None and self._squares is not None:
            self._total += z.sum(0) if self._weights is None else self._weights[block].to(z.dtype) @ z
            self._squares += torch.linalg.vecdot(z, z, dim=0)
        self._predict(z, block)
        u = scaled(z, self._temperature, self._softmax.classes, block, scratch)
        # Clamped, so that a tile without any class leaves no −inf to subtract from −inf.
        largest = torch.maximum(self._max, u.amax(0).clamp_(min=self._lowest))
        decay = (self._max - largest).exp_()
        p = torch.sub(u, largest, out=scratch).exp_()
        self._sum = self._sum * decay + p.sum(0)
        self._max = largest
        if self._expected is not None:
            self._expected = self._expected * decay + p.mul_(self._logits.bounded(z)).sum(0)
        return largest

    def _predict(self, z: Tensor, block: slice) -> None:
        """Note where a tile (B, T) holds a row's largest logit so far.

        Only rows whose largest logit grew are searched: of the k-th tile 1/k of them, if classes come in no
        order, and a search of all costs a fifth of a product at D = 512.
        """
        if self._largest is None or self._predicted is None:
            return
        largest = z.amax(0)
        grown = (largest > self._largest).nonzero().squeeze(1)
        self._predicted[grown] = z[:, grown].argmax(0) + block.start
        self._largest = torch.maximum(self._largest, largest)

    def finish(self) -> RowSums:
        """Return the sums; the logits' precision is kept by leaving maximum and log apart."""
        log_total = self._sum.log()
        expected = None if self._expected is None else self._expected / self._sum
        return RowSums(
            self._max + log_total,
            self._target,
            expected,
            self._total,
            self._squares,
            maximum=self._max,
            log_total=log_total,
            largest=self._largest,
            predicted=self._predicted,
        )


class Weighted:
    """Σ_k q_k z_k of rows, with q the softmax of other logits, taken tile by tile with a running maximum.

    Args:
        rows: T.
        like: A tensor of the sums' dtype and device.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self._max = like.new_full((rows,), torch.finfo(like.dtype).min)
        self._sum, self._weighted = like.new_zeros(rows), like.new_zeros(rows)

    def add(self, u: Tensor, z: Tensor) -> None:
        """Take a tile (B, T) of the softmax's arguments, overwritten here, and one of what is averaged."""
        largest = torch.maximum(self._max, u.amax(0))
        decay = (self._max - largest).exp_()
        q = u.sub_(largest).exp_()
        self._sum = self._sum * decay + q.sum(0)
        self._weighted = self._weighted * decay + q.mul_(z).sum(0)
        self._max = largest

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the weighted sums and log Σ_k exp u_k, each (T,)."""
        return self._weighted / self._sum, self._max + self._sum.log()


def scaled(
    z: Tensor, temperature: float | Tensor, classes: Tensor | None, block: slice, scratch: Tensor
) -> Tensor:
    """Return z/τ with −inf in classes that take no part: ``z`` itself, or ``scratch``, if that changes it.

    Args:
        z: Logits of a tile, shape (B, T).
        temperature: τ, one number or shape (T,).
        classes: Which classes take part, bool, shape (V,); None for all.
        block: The tile's classes.
        scratch: Room of the tile's shape.
    """
    if isinstance(temperature, float) and temperature == 1.0 and classes is None:
        return z
    u = torch.div(z, temperature, out=scratch)
    return u if classes is None else u.masked_fill_(~classes[block, None], float("-inf"))
