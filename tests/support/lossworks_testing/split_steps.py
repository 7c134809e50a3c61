"""Steps of optimisers on parameters that are split over ranks, and on the same ones whole."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lossworks.specs import OptimizerSpec
from lossworks.training.optimizer import build_optimizers

SHAPES = ((6, 4), (5, 8), (1, 4), (7,))  # the third leaves a rank without a row


class Bare(nn.Module):
    """Parameters of some shapes, of a body."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(tensors)


def differences(kind: str, steps: int = 3) -> list[float]:
    """Return by how much split parameters differ from whole ones after some steps, at most, by shape."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    initial = [torch.randn(*shape, generator=generator) for shape in SHAPES]
    whole = Bare([tensor.clone() for tensor in initial])
    split = Bare([distribute_tensor(tensor.clone(), mesh, [Shard(0)]) for tensor in initial])
    spec = OptimizerSpec(kind=kind, lr=0.1, weight_decay=0.1)
    optimizers = [build_optimizers(model, spec) for model in (whole, split)]
    for _ in range(steps):
        for one, other in zip(whole.parts, split.parts, strict=True):
            one.grad = torch.randn(*one.shape, generator=generator)
            other.grad = distribute_tensor(one.grad.clone(), mesh, [Shard(0)])
        for optimizer in (*optimizers[0], *optimizers[1]):
            optimizer.step()
    return [
        float((one - other.full_tensor()).abs().max())
        for one, other in zip(whole.parts, split.parts, strict=True)
    ]


def all_differences() -> dict[str, list[float]]:
    """Return the differences of every kind."""
    return {kind: differences(kind) for kind in ("adamw", "sgd", "muon", "adafactor")}
