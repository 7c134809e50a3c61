"""The processes that train together, seen from one of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process's place among those that train together.

    Attributes:
        rank: From 0 to size − 1.
        size: Number of processes.
        device: Where this process computes.
        group: The processes' group that talks; None for the default one.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls) -> "World":
        """Return the place in torch.distributed's default group, or a world of one without a group.

        A group over NCCL computes on GPUs and any other on CPUs, whatever the machine has besides; without a
        group a GPU is used if there is one.
        """
        if not dist.is_initialized():
            return cls(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        device = _own_gpu() if "nccl" in dist.get_backend() else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def apart(self) -> "World":
        """Return the same processes in a group of their own over gloo, for a thread beside the training's.

        All of them must call it. What two threads say in one group could cross.
        """
        if self.size == 1:
            return self
        return World(self.rank, self.size, torch.device("cpu"), dist.new_group(backend="gloo"))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> torch.Tensor:
        """Return every rank's ``values`` as float64, shape (size, len(values)), on the CPU."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size == 1:
            return own[None].cpu()
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own, group=self.group)
        return torch.stack(rows).cpu()

    def agree(self, value: Any) -> Any:
        """Return rank 0's ``value`` on every rank; it must be plain data."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device, group=self.group)
        return box[0]

    def first(self, value: str | None) -> str | None:
        """Return the text of the lowest rank that has one, on every rank; None if none has."""
        if self.size == 1:
            return value
        texts: list[str | None] = [None] * self.size
        dist.all_gather_object(texts, value, group=self.group)
        return next((text for text in texts if text is not None), None)


def _own_gpu() -> torch.device:
    """Return this process's GPU: that of its local rank, or the only one that it is shown."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
