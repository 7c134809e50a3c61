"""From tiles of logits to gradients: ∂L/∂z, the two products with it, and what a filter leaves out."""

import torch
from torch import Tensor

from lossworks.head.core.filtering import Remainder, add_rank_one
from lossworks.head.core.problem import Coefficients, Filter, Gradients, RowSums, Softmax
from lossworks.head.cpu.tiles import Logits, per_row, scaled

# Above this share of kept columns, gathering them costs more than the products that it saves.
_DENSE_SHARE = 0.6


class Slopes:
    """Accumulates the gradients of E, C and the bias over tiles, in a fixed order.

    Args:
        logits: Where tiles come from.
        softmax: Of which temperature and classes.
        wanted: Whether the gradients of E, C and the bias are wanted.
        filtering: Which columns may be left out, or None.
        in_blocks: Tiles come class block by class block, so that ∂C of a block is finished at once and needs
            no wide accumulator for all of C.
        rows_alike: Whether ∂E has to have the same bits wherever a row stands.
    """

    def __init__(
        self,
        logits: Logits,
        softmax: Softmax,
        wanted: tuple[bool, bool, bool],
        filtering: Filter | None,
        *,
        in_blocks: bool,
        rows_alike: bool = False,
    ) -> None:
        self._logits, self._softmax = logits, softmax
        problem, wide = logits.problem, logits.wide
        self._e = problem.e.new_zeros(problem.e.shape, dtype=wide) if wanted[0] else None
        if rows_alike and self._e is not None:
            # Rows along what is contiguous: BLAS takes those of a product with few features differently else.
            self._e = problem.e.new_zeros(problem.e.shape[::-1], dtype=wide).t()
        final = problem.c.dtype if in_blocks else wide
        # The first rows write every class, unless a filter leaves some out; zeroing would cost a pass.
        new = torch.empty if filtering is None else torch.zeros
        self._c = new(problem.c.shape, dtype=final, device=problem.c.device) if wanted[1] else None
        self._bias = logits.e.new_zeros(logits.classes, dtype=wide) if wanted[2] else None
        self._filter = filtering
        self._remainder = Remainder(len(logits), logits.classes, logits.e.new_zeros((), dtype=wide))
        self._block: tuple[slice, Tensor] | None = None

    def add(
        self,
        z: Tensor,
        block: slice,
        rows: slice,
        sums: RowSums,
        parts: Coefficients,
        base: Tensor | None = None,
        bend: Tensor | None = None,
    ) -> None:
        """Take in a tile.

        Args:
            z: Logits with their offset, shape (B, T), or exp(z/τ − base); overwritten.
            block: The tile's classes.
            rows: The tile's rows.
            sums: Of these rows.
            parts: Coefficients of these rows.
            base: Shape (T,), where the exponential is already taken; not with a softcap, an expected or a
                linear part, which need the logits.
            bend: The softcap's derivative, shape (B, T), if there is a softcap.
        """
        hits = self._logits.hits(block, rows)
        soft = self._logits.soft(block, rows)
        simple = parts.expected is None and parts.linear is None and soft is None
        if self._filter is not None and simple and self._logits.problem.softcap is None:
            p, factor = self._exponentials(z, block, rows, sums, base, z)
            self._add_filtered(p.mul_(factor), block, rows, parts, hits, self._filter.eps)
        else:
            g = self._slope(z, block, rows, sums, parts, hits, soft, base)
            self._add_all(g if bend is None else g.mul_(bend), block, rows)

    def borrowed(self) -> Tensor:
        """Return room for the logits of all rows, (V, N), in the memory of ∂C; N is at most D."""
        return self._gradient_of(slice(0, self._logits.classes))[:, : len(self._logits)]

    def give_back(self, block: slice) -> Tensor:
        """Return a copy (B, N) of a block of what was written there, and leave the block to its gradient."""
        into = self._gradient_of(block)
        z = into[:, : len(self._logits)].clone(memory_format=torch.contiguous_format)
        if self._filter is not None:
            into.zero_()
        return z

    def add_given(self, g: Tensor, block: slice, rows: slice) -> None:
        """Take in a tile of ∂L/∂(C·e), shape (B, T)."""
        self._add_all(g, block, rows)

    def finish(self, constant: Tensor | None, weights: Tensor | None) -> tuple[Gradients, Tensor | None]:
        """Return the gradients, wide (∂C in C's dtype if made in blocks), and the mass left out of each row.

        Args:
            constant: The constant part of all rows' coefficients, shape (N,), or None.
            weights: Its weights, shape (V,), or None.
        """
        self._flush()
        problem = self._logits.problem
        gradients = Gradients(self._e, self._c, self._bias)
        if constant is not None and not self._constant_inside:
            w = constant.new_ones(len(problem.c)) if weights is None else weights.to(constant.dtype)
            add_rank_one(gradients, problem, constant, w)
        if self._filter is None:
            return gradients, None
        if self._filter.repair:
            self._remainder.add_to(gradients, problem)
        return gradients, self._remainder.mass

    @property
    def _constant_inside(self) -> bool:
        """Whether the constant part needs the tile: only a softcap bends it."""
        return self._logits.problem.softcap is not None

    def _exponentials(
        self, z: Tensor, block: slice, rows: slice, sums: RowSums, base: Tensor | None, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a tile in ``out``, which may be ``z``, and the factors (T,) that make it probabilities."""
        maximum, log_total = sums.shifted()
        if base is not None:
            return z, torch.exp(base - maximum - log_total)
        u = scaled(z, per_row(self._softmax.temperature, rows), self._softmax.classes, block, out)
        return torch.sub(u, maximum, out=out).exp_(), torch.exp(-log_total)

    def _slope(
        self,
        z: Tensor,
        block: slice,
        rows: slice,
        sums: RowSums,
        parts: Coefficients,
        hits: tuple[Tensor, Tensor],
        soft: Tensor | None,
        base: Tensor | None,
    ) -> Tensor:
        """Return ∂L/∂z of a tile of capped logits."""
        keep_z = parts.expected is not None or parts.linear is not None
        out = torch.empty_like(z) if keep_z else z
        g, inverse = self._exponentials(z, block, rows, sums, base, out)
        if parts.expected is not None and sums.expected is not None:
            slant = parts.expected / per_row(self._softmax.temperature, rows)
            flat = parts.expected - slant * sums.expected
            flat = flat if parts.softmax is None else flat + parts.softmax
            g *= torch.addcmul(flat * inverse, self._logits.bounded(z), slant * inverse)
        else:
            g *= inverse * (0.0 if parts.softmax is None else parts.softmax)
        if parts.linear is not None:
            g.addcmul_(z, parts.linear)
        if parts.constant is not None and self._constant_inside:
            weights = parts.constant_weights
            g += parts.constant if weights is None else weights[block, None].to(g.dtype) * parts.constant
        if parts.target is not None:
            if soft is not None:
                g.addcmul_(soft, parts.target)
            # In wide precision: p − 1 of a rounded p loses all digits of a confident row.
            g[hits] += parts.target[hits[1]]
        return g

    def _add_all(self, g: Tensor, block: slice, rows: slice) -> None:
        """Add both products of a whole tile of ∂L/∂z."""
        if self._bias is not None:
            self._bias[block] += g.sum(1)
        factor = g.to(self._logits.products)
        if self._e is not None:
            _add_product(self._e[rows], factor.t(), self._logits.c(block))
        if self._c is not None:
            fresh = self._filter is None and rows.start == 0
            _add_product(self._gradient_of(block), factor, self._logits.own_e[rows], fresh=fresh)

    def _add_filtered(
        self,
        p: Tensor,
        block: slice,
        rows: slice,
        parts: Coefficients,
        hits: tuple[Tensor, Tensor],
        eps: float,
    ) -> None:
        """Add the columns in which any probability of the tile reaches eps, or which are a target."""
        large = p.amax(1) >= eps
        large[hits[0]] = True
        kept = large.nonzero().squeeze(1)
        a = torch.zeros_like(p[0]) if parts.softmax is None else parts.softmax
        whole = len(kept) > _DENSE_SHARE * len(p)
        kept_p = p if whole else p[kept]
        if not whole:
            self._remainder.drop(p, kept, kept_p, block, rows, a)
        g = kept_p.mul_(a)
        if parts.target is not None:
            place = hits[0] if whole else torch.searchsorted(kept, hits[0])
            g[place, hits[1]] += parts.target[hits[1]]
        if whole:
            self._add_all(g, block, rows)
        else:
            self._add_columns(g, kept, block, rows)

    def _add_columns(self, g: Tensor, kept: Tensor, block: slice, rows: slice) -> None:
        """Add both products of some columns of a tile: gather, small products, scatter."""
        if self._bias is not None:
            self._bias[block].index_add_(0, kept, g.sum(1))
        factor = g.to(self._logits.products)
        if self._e is not None:
            _add_product(self._e[rows], factor.t(), self._logits.c(block)[kept])
        if self._c is not None:
            part = (factor @ self._logits.own_e[rows]).to(self._logits.wide)
            self._gradient_of(block).index_add_(0, kept, part)

    def _gradient_of(self, block: slice) -> Tensor:
        """Return the wide accumulator of a block of ∂C."""
        if self._c is None or self._c.dtype == self._logits.wide:
            return self._c[block]  # type: ignore[index]  # only called where C's gradient is wanted
        if self._block is None or self._block[0] != block:
            self._flush()
            self._block = block, self._c.new_zeros(self._c[block].shape, dtype=self._logits.wide)
        return self._block[1]

    def _flush(self) -> None:
        """Round a finished block of ∂C, once."""
        if self._block is not None and self._c is not None:
            self._c[self._block[0]] = self._block[1].to(self._c.dtype)
        self._block = None


def _add_product(into: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """Add a·b, or write it if ``into`` holds nothing yet."""
    if a.dtype != into.dtype:
        into.copy_(a @ b) if fresh else into.add_(a @ b)
    elif fresh:
        torch.mm(a, b, out=into)
    else:
        into.addmm_(a, b)
