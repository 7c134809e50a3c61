"""A head whose classes are spread over the ranks for good, under FSDP: how it gets there, and what it is fed.

FSDP gathers a parameter for every rank, and each rank uses all of it on its own tokens. Here each rank keeps
its classes, V/ranks × D of them, and all ranks' features go around instead: gathered in the forward pass, and
their gradients, which every rank has from its own classes only, summed and scattered in the backward pass.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lossworks.errors import UserError
from lossworks.models import Head, HeadedModel
from lossworks.training.batches import IGNORE_INDEX


def split_head(model: HeadedModel, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Replace the head's parameters by this rank's classes of them, and return the new ones.

    They are placed as FSDP places its own, so that checkpoints, clipping and the optimiser see no difference.

    Args:
        model: With equal parameters on every rank.
        mesh: Of one dimension.

    Raises:
        UserError: The head is the embedding, too, or there are too few classes for the ranks.
    """
    head = model.head()
    _require_classes(len(head.weight), mesh.size())
    found = (head.weight,) if head.bias is None else (head.weight, head.bias)
    return {_replace(model, parameter, mesh) for parameter in found}


def head_group(head: Head) -> dist.ProcessGroup | None:
    """Return the group that holds the head's classes together, or None for a head that is whole here."""
    return head.weight.device_mesh.get_group() if isinstance(head.weight, DTensor) else None


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


def _require_classes(classes: int, ranks: int) -> None:
    """Refuse what would leave a rank without a class: all but the last hold ⌈V/ranks⌉ each."""
    if -(-classes // ranks) * (ranks - 1) >= classes:
        raise UserError(
            f"sharding.vocab_parallel=true: the {classes} classes of the head don't give each of {ranks} "
            f"workers one; use fewer workers"
        )


def _replace(model: nn.Module, parameter: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    owners = [
        (module, name)
        for module in model.modules()
        for name, held in module.named_parameters(recurse=False)
        if held is parameter
    ]
    if len(owners) != 1 or isinstance(owners[0][0], nn.Embedding):
        raise UserError(
            "sharding.vocab_parallel=true: the model's head is its embedding, too, whose look-up needs all "
            "classes; use a model with a head of its own, or sharding.vocab_parallel=false"
        )
    module, name = owners[0]
    # Every rank has the whole tensor, so it is cut and not sent around.
    part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
    setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    return getattr(module, name)
