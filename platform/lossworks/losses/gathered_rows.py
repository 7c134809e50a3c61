"""What a head is fed whose classes are spread over ranks: the rows of all ranks.

FSDP gathers a parameter for every rank, and each rank uses all of it on its own tokens. Where each rank keeps
its classes of the head instead, all ranks' features go around: they are gathered in the forward pass, and
their gradients, which every rank has from its own classes only, are summed and scattered in the backward
pass.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lossworks.data.batch import IGNORE_INDEX
from lossworks.models.interface import Head


def head_group(head: Head | None) -> dist.ProcessGroup | None:
    """Return the group that holds the head's classes together, or None for a head that is whole here."""
    if head is None or not isinstance(head.weight, DTensor):
        return None
    return head.weight.device_mesh.get_group()


def gather_rows(hidden: Tensor, targets: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the features and targets of all ranks' tokens, in the order of the ranks.

    The gradient that arrives at the features is this rank's part of it, and is summed over the ranks. It is
    also multiplied by their number: each rank is to train on 1/ranks of the loss of all tokens, and the
    features are part of each rank's.

    Args:
        hidden: Shape (…, D).
        targets: Shape (…), as many as the rank has.
        group: Of ranks with as many rows as they like.

    Returns:
        Shapes (N, D) and (N,); a rank with fewer rows than another is filled up with ignored ones.
    """
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    most = torch.tensor(len(flat), device=flat.device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    missing = int(most) - len(flat)
    rows = nn.functional.pad(rows, (0, 0, 0, missing))
    flat = nn.functional.pad(flat, (0, missing), value=IGNORE_INDEX)
    return _GatherRows.apply(rows, group), _gathered(flat, group)


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, and the sum over all ranks of their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.group.size()
        own = gradient.new_empty(len(gradient) // ranks, *gradient.shape[1:])
        dist.reduce_scatter_single(own, gradient.contiguous(), group=ctx.group)
        return own * ranks, None


def _gathered(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    everyone = rows.new_empty(len(rows) * group.size(), *rows.shape[1:])
    dist.all_gather_single(everyone, rows.contiguous(), group=group)
    return everyone
