"""Exact cross-entropy of a linear classifier in chunks of rows, gradient in the same pass.

Per chunk of T rows: logits Z = E·Cᵀ (product 1), softmax P in place, G = P − onehot in the same buffer,
∂E = G·C (product 2) and ∂C += Gᵀ·E (product 3). The buffer of T·V numbers is the only thing that grows with
the number of classes, besides the gradient of C itself. Every sum has a fixed order, so results repeat.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# A chunk's buffer that stays in the caches is faster than memory, but each chunk also reads and writes all of
# ∂C, which below about 128 rows costs more than the chunk's own products.
_BUFFER_BYTES = 8 * 2**20
_LEAST_ROWS = 128


def chunk_rows(rows: int, classes: int) -> int:
    """Return how many of ``rows`` a chunk takes for ``classes`` columns of float32."""
    return max(1, min(rows, max(_LEAST_ROWS, _BUFFER_BYTES // (4 * classes))))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of rows of E against C: their sum, or one value a row."""

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        per_row: bool,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> Tensor:
        """Return the summed loss, or the losses (N,) if ``per_row``.

        Args:
            ctx: Autograd's context.
            e: Embeddings, shape (N, D).
            c: Classifier, shape (V, D).
            bias: Shape (V,), or None.
            targets: Class indices, none of them ignored, shape (N,).
            softcap: Cap of the logits' magnitude, or None.
            per_row: Return one loss a row; the gradient then waits for the backward pass.
            dtype: Of the matrix products.
            grad_enabled: Whether anybody will ask for gradients.
        """
        wanted = tuple(grad_enabled and need for need in ctx.needs_input_grad[:3])
        head = _Head(c.to(dtype), bias, softcap)
        rows = e.to(dtype)
        losses = rows.new_empty(len(rows), dtype=head.wide)
        ctx.inputs = (e.dtype, c.dtype)
        if per_row:
            for chunk in _chunks(len(rows), head.classes):
                losses[chunk] = head.losses(rows[chunk], targets[chunk])
            ctx.head, ctx.dtype, ctx.softcap = None, dtype, softcap
            ctx.save_for_backward(e, c, bias, targets)
            return losses
        ctx.gradients = _Gradients(head, rows, wanted)
        for chunk in _chunks(len(rows), head.classes):
            losses[chunk] = ctx.gradients.add(chunk, rows[chunk], targets[chunk], None)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of E, C and the bias for the gradient arriving at the loss."""
        (g,) = upstream
        if g.dim() == 0:
            scaled = [None if value is None else value * g for value in ctx.gradients.values()]
        else:
            scaled = list(_recompute(ctx, g))
        e_dtype, c_dtype = ctx.inputs
        e, c, bias = scaled
        return (
            None if e is None else e.to(e_dtype),
            None if c is None else c.to(c_dtype),
            bias,
            *(None,) * 5,
        )


def _recompute(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
    """Form the gradients when row i's loss is weighted by ``g[i]``; one more product than in the forward."""
    e, c, bias, targets = ctx.saved_tensors  # type: ignore[attr-defined]
    head = _Head(c.to(ctx.dtype), bias, ctx.softcap)  # type: ignore[attr-defined]
    rows = e.to(ctx.dtype)  # type: ignore[attr-defined]
    gradients = _Gradients(head, rows, ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
    for chunk in _chunks(len(rows), head.classes):
        gradients.add(chunk, rows[chunk], targets[chunk], g[chunk])
    return gradients.values()


def _chunks(rows: int, classes: int) -> list[slice]:
    size = chunk_rows(rows, classes)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _Head:
    """A classifier, and the buffer that its chunks share."""

    def __init__(self, c: Tensor, bias: Tensor | None, softcap: float | None) -> None:
        self.c = c
        self.classes = len(c)
        self.wide = torch.promote_types(c.dtype, torch.float32)
        self.bias = None if bias is None else bias.to(self.wide)
        self.softcap = softcap
        self._buffer: Tensor | None = None

    def logits(self, e: Tensor) -> Tensor:
        """Return the chunk's logits in the shared buffer, float32 or wider, shape (T, V)."""
        if self._buffer is None:
            self._buffer = e.new_empty(len(e), self.classes, dtype=self.wide)
        z = self._buffer[: len(e)]
        if self.c.dtype == self.wide:
            torch.mm(e, self.c.t(), out=z)
        else:
            z.copy_(e @ self.c.t())
        if self.bias is not None:
            z += self.bias
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def losses(self, e: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row of a chunk, and leave exp(z − max) in the buffer."""
        return self.normalise(self.logits(e), targets)[0]

    @staticmethod
    def normalise(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Turn logits into exp(z − max) in place; return losses (T,) and normalisers (T, 1)."""
        largest = z.amax(dim=1, keepdim=True)
        # Shifted first, or a large common offset would cancel digits of the loss.
        z -= largest
        target = z.gather(1, targets[:, None]).squeeze(1)
        total = z.exp_().sum(dim=1, keepdim=True)
        return total.log().squeeze(1) - target, total


class _Gradients:
    """The gradients of a summed loss, filled chunk by chunk."""

    def __init__(self, head: _Head, rows: Tensor, wanted: tuple[bool, ...]) -> None:
        self._head = head
        need_e, need_c, need_bias = wanted
        self._any = any(wanted)
        self._e = torch.empty_like(rows) if need_e else None
        # Float32 whatever the products' dtype: in bfloat16 the error would grow with the number of chunks.
        self._c = torch.zeros_like(head.c, dtype=head.wide) if need_c else None
        self._bias = head.c.new_zeros(head.classes, dtype=head.wide) if need_bias else None

    def values(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of E, C and the bias, None where not asked for."""
        return self._e, self._c, self._bias

    def add(self, chunk: slice, e: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        """Add a chunk's part and return its losses (T,)."""
        head = self._head
        z = head.logits(e)
        slope = None if head.softcap is None or not self._any else 1 - (z / head.softcap).square_()
        losses, total = head.normalise(z, targets)
        if not self._any:
            return losses
        g = z.div_(total)
        # Formed in float32: p − 1 of a rounded p loses all digits of a confident row.
        g.scatter_add_(1, targets[:, None], g.new_full((len(g), 1), -1.0))
        if weight is not None:
            g *= weight[:, None]
        if slope is not None:
            g *= slope
        if self._bias is not None:
            self._bias += g.sum(dim=0)
        self._multiply(chunk, g.to(head.c.dtype), e)
        return losses

    def _multiply(self, chunk: slice, g: Tensor, e: Tensor) -> None:
        if self._e is not None:
            torch.mm(g, self._head.c, out=self._e[chunk])
        if self._c is None:
            return
        if g.dtype == self._c.dtype:
            self._c.addmm_(g.t(), e)
        else:
            self._c += g.t() @ e
