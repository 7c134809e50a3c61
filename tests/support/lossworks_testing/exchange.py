"""Gradients of a small model on several ranks, with its communication timed and without."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lossworks.training.distributed.communication import time_communication
from lossworks.training.measure.phases import HostTicks, PhaseClock

_CPU = torch.device("cpu")


def compare_exchange(late: float) -> dict[str, dict[str, Any]]:
    """Return by sharding whether timed gradients equal plain ones, and the seconds of communication.

    The last rank comes ``late`` by so many seconds to the backward pass of the second, timed step.
    """
    found: dict[str, dict[str, Any]] = {"equal": {}, "changed": {}, "communication": {}}
    for kind in ("ddp", "fsdp"):
        # One model for both steps: DDP deals its buckets anew after the first, and sums them in other orders.
        untimed = _model(kind)
        plain = [_gradients(untimed, step) for step in range(2)]
        timed, clock = _model(kind), PhaseClock(HostTicks())
        time_communication(timed, clock, _CPU)
        first = _gradients(timed, 0)
        dist.barrier()
        if dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(late)
        clock.start()
        second = _gradients(timed, 1, clock)
        found["communication"][kind] = clock.total()["communication"]
        found["equal"][kind] = all(map(torch.equal, [*plain[0], *plain[1]], [*first, *second]))
        found["changed"][kind] = not torch.equal(first[0], second[0])
    return found


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 600), nn.ReLU(), nn.Linear(600, 700), nn.ReLU(), nn.Linear(700, 3))
    if kind == "ddp":
        # Buckets of less than a MiB, so that there are several.
        return DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _gradients(model: nn.Module, step: int, clock: PhaseClock | None = None) -> list[Tensor]:
    """Return the gradients of one step on data that each rank has of its own."""
    torch.manual_seed(10 * step + dist.get_rank())
    model.zero_grad()
    loss = model(torch.randn(5, 7)).square().sum()
    with (clock or PhaseClock(HostTicks()))("backward"):
        loss.backward()
    return [
        (p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad).clone() for p in model.parameters()
    ]
