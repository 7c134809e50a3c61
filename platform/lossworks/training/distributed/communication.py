"""What a rank waits for in the exchange of gradients and parameters, told to the clock of its phases."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lossworks.training.measure.phases import PhaseClock


def time_communication(model: nn.Module, clock: PhaseClock, device: torch.device) -> None:
    """Have a distributed model's communication counted, without a change to what it computes.

    With DDP gradients travel while the backward pass goes on; what it still waits for after its last bucket
    of gradients was sent off is communication. FSDP2 on CPUs waits inside each of its collectives. On GPUs it
    runs them in streams of its own, and which part of them the computation waits for is not to be seen from
    outside: there they count in the phase that waits, forward, head or backward. So do the exchanges inside a
    head that is split over ranks.

    Args:
        model: As :func:`lossworks.training.distributed.sharding.distribute` returns it.
        clock: Gets the phase ``communication``.
        device: Where the model is.
    """
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(clock, _average)
    elif isinstance(model, FSDPModule) and device.type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(_AllGather(clock))  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(_ReduceScatter(clock))  # type: ignore[arg-type]


def _average(clock: PhaseClock, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket over ranks, bit for bit as DDP does by itself."""
    # DDP multiplies by the reciprocal; a division would round otherwise where the size is no power of two.
    scaled = bucket.buffer().mul_(1 / dist.get_world_size())
    future = dist.all_reduce(scaled, async_op=True).get_future()
    if bucket.is_last():
        clock.turn("communication")
    averaged: torch.futures.Future[Tensor] = future.then(_first)
    return averaged


def _first(done: torch.futures.Future[list[Tensor]]) -> Tensor:
    return done.value()[0]


class _Allocation:
    """Where FSDP's exchanges put their results: wherever the allocator likes."""

    def __init__(self, clock: PhaseClock) -> None:
        self._clock = clock

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a new tensor."""
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Allocation):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        """Gather parameters."""
        with self._clock("communication"):
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Allocation):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        """Add up gradients."""
        with self._clock("communication"):
            return dist.reduce_scatter_single(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            )
