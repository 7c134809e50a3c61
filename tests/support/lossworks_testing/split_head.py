"""What each rank is asked in tests of a head that training has split; new processes import it."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as ByClass

from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.models import Head, Outputs, build_model
from lossworks.specs import LossSpec, ModelSpec
from lossworks.training.distributed.split_head import split_head

CLASSES = 17
ROWS = (4, 0, 7)  # of each rank
UNTIED = ModelSpec(layers=1, width=8, heads=2, tied=False)


def shares() -> tuple[list[float], list[float]]:
    """Return how far loss and gradients are from those of one process, with ranks of unequal many rows.

    The gradients are as the trainer makes them: of the rank's share times the number of ranks, then averaged
    over ranks where the parameter is everywhere, and as they are where it is split.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (sum(ROWS), CLASSES)
    )
    targets = torch.randint(CLASSES, (sum(ROWS),), generator=generator)
    targets[[0, 5]] = -100
    objective, mesh = Objective(LossSpec()), init_device_mesh("cpu", (ranks,))
    whole = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = objective(Outputs(whole[0], Head(whole[1])), {"targets": targets}).sum()
    expected.backward()
    mine = hidden.split(ROWS)[rank].clone().requires_grad_()
    split = distribute_tensor(weight, mesh, [ByClass(0)]).requires_grad_()
    own = {"targets": targets.split(ROWS)[rank]}
    share = objective(Outputs(mine, Head(split)), own).sum()
    (share * ranks).backward()
    return (
        [_error(_sum(share.detach()), expected)],
        [
            _error(mine.grad / ranks, whole[0].grad.split(ROWS)[rank]),
            _error(split.grad.full_tensor(), whole[1].grad),
        ],
    )


def logits() -> float:
    """Return how far the logits of a sharded model with a split head are from those of a whole one."""
    model = build_model(UNTIED, vocab_size=CLASSES, seed=0)
    tokens = torch.arange(8)[None] + dist.get_rank()
    expected = model.logits(tokens)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, ignored_params=split_head(model, mesh))
    register_fsdp_forward_method(model, "logits")
    with torch.no_grad():
        return _error(model.logits(tokens), expected)


def placement() -> list[tuple[str, int]]:
    """Return names and rows of the parameters that are left to a rank by ``split_head``."""
    model = build_model(UNTIED, vocab_size=CLASSES, seed=0)
    split_head(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    named = dict(model.named_parameters())
    return [(name, len(p.to_local())) for name, p in named.items() if isinstance(p, DTensor)]


def refusals() -> list[str]:
    """Return why a tied model, and one with too few classes, can't be split."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    said = []
    for model in (
        build_model(UNTIED.model_copy(update={"tied": True}), vocab_size=CLASSES, seed=0),
        build_model(UNTIED, vocab_size=4, seed=0),
    ):
        try:
            split_head(model, mesh)
        except UserError as error:
            said.append(str(error))
    return said


def everything() -> dict:
    """Return what all functions above do."""
    return {function.__name__: function() for function in (shares, logits, placement, refusals)}


def _sum(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max()) if found.numel() else 0.0
