"""A head whose classes are spread over the ranks for good, under FSDP: each keeps V/ranks × D of them.

What it is fed, the rows of all ranks, is in :mod:`lossworks.losses.gathered_rows`.
"""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from lossworks.errors import UserError
from lossworks.models import HeadedModel


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
    found: nn.Parameter = getattr(module, name)
    return found
