"""The rows that count: targets checked, ignored rows dropped, classes of other ranks told apart."""

from typing import overload

import torch
from torch import Tensor

from lossworks.adapters.torch_private import transformed, without_values
from lossworks.errors import UserError
from lossworks.head.core.low_rank import Frozen
from lossworks.head.core.problem import Gradients, LinearProblem, RowSums
from lossworks.head.core.vocab_parallel import Shard


class ValidRows:
    """Turns what a caller passes into a :class:`LinearProblem` without ignored rows, and results back.

    Args:
        e: Shape (N, D).
        c: Shape (V, D), this rank's classes only if there is a group.
        targets: Shape (N,), indices into all classes, or ``ignore_index``.
        bias: Shape (V,), or None.
        softcap: Cap of the logits, or None.
        ignore_index: The target of rows that count for nothing.
        group: Name of the process group that holds C together, or None.
        target_offset: Shape (N,), or None.
        probabilities: Soft targets (N, V), or None.
        frozen: Columns of the classifier before those of ``c``, or None.

    Raises:
        UserError: A target is out of range.
    """

    def __init__(
        self,
        e: Tensor,
        c: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        ignore_index: int,
        group: str | None,
        target_offset: Tensor | None = None,
        probabilities: Tensor | None = None,
        frozen: Frozen | None = None,
    ) -> None:
        self._e, self._c, self._bias = e, c, bias
        self._shard = None if group is None else Shard.of(group, len(c), c.device)
        classes = len(c) if self._shard is None else self._shard.classes
        if probabilities is None:
            check_range(targets, classes=classes, ignore_index=ignore_index)
        valid = (targets != ignore_index).nonzero().squeeze(1)
        self._valid = None if len(valid) == len(targets) else valid
        local = targets if self._shard is None else self._shard.local(targets)
        if probabilities is not None:
            local = torch.full_like(targets, -1)
        self.problem = LinearProblem(
            self.keep(e),
            c,
            self.keep(local),
            bias,
            softcap,
            self.keep(target_offset),
            self.keep(probabilities),
            frozen,
        )

    @property
    def plan_classes(self) -> int | None:
        """The V by which all ranks choose their tiles alike, or None where there is one rank."""
        return None if self._shard is None else max(self._shard.sizes)

    @overload
    def keep(self, column: Tensor) -> Tensor: ...

    @overload
    def keep(self, column: Tensor | None) -> Tensor | None: ...

    def keep(self, column: Tensor | None) -> Tensor | None:
        """Return the part of a tensor (N, …) that belongs to rows that count."""
        return column if column is None or self._valid is None else column[self._valid]

    def temperature(self, value: Tensor) -> float | Tensor:
        """Return a temperature as one number, or as one per row that counts."""
        return self.keep(value) if value.dim() else float(value)

    def combine(self, sums: RowSums) -> RowSums:
        """Complete the sums of some rows with those of other ranks' classes."""
        return sums if self._shard is None else self._shard.combine(sums)

    def spread(self, column: Tensor | None, elsewhere: int = 0) -> Tensor:
        """Return a result (n,) of rows that count as one of all rows (N,); empty for None."""
        if column is None:
            return self._e.new_empty(0, dtype=self.problem.wide)
        if self._valid is None:
            return column.clone()
        return column.new_full((len(self._e),), elsewhere).index_copy_(0, self._valid, column)

    def predicted(self, classes: Tensor | None) -> Tensor:
        """Return the predicted classes (n,) of rows that count as those of all rows (N,), −1 elsewhere."""
        if classes is None:
            return torch.empty(0, dtype=torch.int64, device=self._e.device)
        return self.spread(classes, -1)

    def over_ranks(self, column: Tensor) -> Tensor:
        """Complete a sum (n,) over this rank's classes, in place, with those of other ranks' classes."""
        if self._shard is not None:
            self._shard.sum(column)
        return column

    def total_mass(self, mass: Tensor | None) -> Tensor:
        """Return the probability left out of each row (N,), over all ranks' classes; empty for None."""
        return self.spread(None if mass is None else self.over_ranks(mass))

    def gradients(
        self, found: Gradients, *, reduce_e: bool, wide: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients in the inputs' shapes, empty for None.

        Args:
            found: The gradients of rows that count.
            reduce_e: Whether ∂E is summed over the ranks.
            wide: Whether they wait for a factor, see :func:`stored`; otherwise they have the inputs' dtypes.
        """
        e, c, bias = found
        if e is not None and self._shard is not None and reduce_e:
            self._shard.sum(e)
        if e is not None and self._valid is not None:
            e = e.new_zeros(self._e.shape).index_copy_(0, self._valid, e)
        pairs = ((e, self._e), (c, self._c), (None if self._bias is None else bias, self._bias))
        kept = [
            self._e.new_empty(0) if g is None or x is None else g.to(stored(x.dtype) if wide else x.dtype)
            for g, x in pairs
        ]
        return kept[0], kept[1], kept[2]


def blanked(rows: Tensor, ignored: Tensor) -> Tensor:
    """Return rows (N, …) with 0 in those that are ignored, bool (N,).

    Whatever such a row holds, it must reach no gradient: 0·NaN is NaN in every sum over rows.
    """
    looked_at = not (without_values(rows, ignored) or transformed(rows, ignored))
    if looked_at and not bool(ignored.any()):
        return rows
    return rows.masked_fill(ignored.reshape(*ignored.shape, *(1,) * (rows.dim() - ignored.dim())), 0)


def stored(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients wait for what they will be multiplied by.

    float16 waits as float32: a sum over many rows is beyond its largest number, and a mean's entries are
    below its smallest; what a gradient scaler brings back must not be lost before.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def check_range(targets: Tensor, *, classes: int, ignore_index: int) -> None:
    """Refuse targets, int64 of any shape, that are out of range.

    On a GPU this waits for the device, as finding the rows that count does anyway.

    Raises:
        UserError: The first offending position and its value.
    """
    if without_values(targets) or transformed(targets):
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= classes))
    if bool(bad.any()):
        position = int(bad.nonzero()[0])
        raise UserError(
            f"targets hold {int(targets[position])}, first in row {position} of {len(targets)}; a class is "
            f"in [0, {classes}), and ignored rows hold ignore_index={ignore_index}"
        )
