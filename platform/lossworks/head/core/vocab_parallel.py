"""Classes spread over the ranks of a process group: which are here, and how sums of rows are completed.

Rank r holds the classes [start, stop) of C as its own rows. A row's sums over all classes take two small
all-reduces (a maximum, then sums relative to it), ∂C none at all, and ∂E is summed over the ranks at the end.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lossworks.adapters.torch_private import process_group
from lossworks.errors import UserError
from lossworks.head.core.problem import RowSums


@dataclass(frozen=True)
class VocabParallel:
    """Says that ``c`` holds this rank's rows of a classifier that a process group holds together.

    Attributes:
        group: The process group; ranks hold consecutive ranges of classes, in their order and of any size.
            Every rank passes the same E and the same targets, which are indices into all classes.
        reduce_e: Sum ∂E over the ranks. Turn it off only where something else does.
    """

    group: dist.ProcessGroup
    reduce_e: bool = True


@dataclass(frozen=True)
class Shard:
    """One rank's part of the classes.

    Attributes:
        group: The process group.
        start: The first class of this rank.
        sizes: The number of classes of each rank.
    """

    group: dist.ProcessGroup
    start: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, name: str, classes: int, device: torch.device) -> "Shard":
        """Return the shard of a rank that holds ``classes`` of them; every rank of the group must call.

        Raises:
            UserError: A rank holds none; it is raised on all ranks.
        """
        group = process_group(name)
        mine = torch.tensor([classes], device=device)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        sizes = tuple(int(size) for size in everyone)
        if 0 in sizes:
            raise UserError(f"c has no class on rank {sizes.index(0)} of {len(sizes)}: every rank needs one")
        return cls(group, sum(sizes[: dist.get_rank(group)]), sizes)

    @property
    def classes(self) -> int:
        """The number of classes V over all ranks."""
        return sum(self.sizes)

    def local(self, targets: Tensor) -> Tensor:
        """Return targets (N,) counted from this rank's first class, −1 where another rank holds them."""
        moved = targets - self.start
        here = (moved >= 0) & (moved < self.sizes[dist.get_rank(self.group)])
        return torch.where(here, moved, -1)

    def combine(self, sums: RowSums) -> RowSums:
        """Complete the sums of some rows with those of the other ranks' classes."""
        maximum, log_total = sums.shifted()
        largest = maximum.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        share = torch.exp(maximum - largest + log_total)
        parts = [share, sums.target]
        parts += [] if sums.expected is None else [share * sums.expected]
        parts += [] if sums.total is None or sums.squares is None else [sums.total, sums.squares]
        packed = torch.stack(parts)
        dist.all_reduce(packed, group=self.group)
        whole, target, *rest = packed.unbind()
        expected = None if sums.expected is None else rest.pop(0) / whole
        total, squares = rest or (None, None)
        log_total = whole.log()
        logsumexp = largest + log_total
        return RowSums(
            logsumexp, target, expected, total, squares, largest, log_total, *self._predicted(sums)
        )

    def _predicted(self, sums: RowSums) -> tuple[Tensor | None, Tensor | None]:
        """Return the largest logit of all ranks' classes and its class; of equal ones the first."""
        if sums.largest is None or sums.predicted is None:
            return None, None
        largest = sums.largest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        predicted = torch.where(sums.largest == largest, sums.predicted + self.start, self.classes - 1)
        dist.all_reduce(predicted, dist.ReduceOp.MIN, group=self.group)
        return largest, predicted

    def sum(self, tensor: Tensor | None) -> None:
        """Sum a tensor of any shape, the same on all ranks, over them in place; None is left out."""
        if tensor is not None:
            dist.all_reduce(tensor, group=self.group)


def agree(complaint: str | None, name: str | None, device: torch.device) -> str | None:
    """Return a complaint about NaN on every rank of the group ``name`` (or None) if any rank has one."""
    if name is None:
        return complaint
    flag = torch.tensor([complaint is not None], dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=process_group(name))
    return complaint or ("another rank's part of c or bias holds NaN or infinity" if bool(flag) else None)


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks that all use alike, so that each rank's part of it gets the sum's own gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ARG004
        whole = part.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return upstream[0], None


class _SumOfGradients(torch.autograd.Function):
    """The identity of what all ranks have alike, whose gradient is the sum over the ranks' parts of it."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        whole = upstream[0].clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole, None


def sum_over_ranks(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of all ranks' parts, differentiable; the sum's gradient is the same on all of them."""
    whole: Tensor = _SumOverRanks.apply(part, group)
    return whole


def sum_gradient_over_ranks(shared: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return a tensor that all ranks have alike, whose gradient is summed over what each rank makes of it."""
    same: Tensor = _SumOfGradients.apply(shared, group)
    return same
