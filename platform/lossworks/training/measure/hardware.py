"""What the device can do at most, and what the process has used."""

import contextlib
import math
import resource
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lossworks.training.distributed.world import World

# Dense peak FLOP/s of bfloat16 products without sparsity, from the makers' data sheets.
_BF16_PEAK: dict[str, float] = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
}
_MEASURED_FOR_S = 0.08  # by every process at its start
_LONG_ENOUGH_S = 0.01  # for a product to say something about those of a model
_LARGEST = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Peak:
    """The most FLOP/s of all ranks together.

    Attributes:
        flops: Over all ranks.
        measured: Whether it is the best rate of a large product here, and not a maker's figure.
    """

    flops: float
    measured: bool

    @classmethod
    def of(cls, world: World, *, bf16: bool) -> "Peak":
        """Return the peak in the precision in use; all ranks call, and measure at the same time.

        So ranks that share cores, memory or power measure what they get while the others work, too.
        """
        known = known_peak(world.device, bf16=bf16)
        # Devices may differ: either all are known, or all are measured. It also has all begin together.
        total = float(world.gather([math.nan if known is None else known]).sum())
        if not math.isnan(total):
            return cls(total, measured=False)
        own = measure_peak(world.device, bf16=bf16)
        return cls(float(world.gather([own]).sum()), measured=True)


def known_peak(device: torch.device, *, bf16: bool) -> float | None:
    """Return the maker's figure of a device's FLOP/s for the precision in use, or None if it isn't known."""
    if device.type != "cuda" or not bf16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _BF16_PEAK.items() if key in name), None)


@cache  # a process's device stays what it is
def measure_peak(device: torch.device, *, bf16: bool) -> float:
    """Return the best FLOP/s of square products within a tenth of a second, after one to warm up.

    The side doubles until a product takes long enough, up to 1,024 on CPUs and 8,192 on GPUs.
    """
    side, best = 128, 0.0
    dtype = torch.bfloat16 if bf16 else torch.float32
    began = time.perf_counter()
    while time.perf_counter() - began < _MEASURED_FOR_S:
        seconds = _product_seconds(side, dtype, device)
        best = max(best, 2 * side**3 / seconds)
        if seconds < _LONG_ENOUGH_S and side < _LARGEST.get(device.type, 1024):
            side *= 2
            _product_seconds(side, dtype, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the run's own peak is what is reported
    return best


def _product_seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    # Ones and not noise: the global stream of random numbers is the run's.
    left = torch.ones(side, side, dtype=dtype, device=device)
    _wait_for(device)
    began = time.perf_counter()
    left @ left
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak_memory(device: torch.device) -> None:
    """Look for the peak anew from here on; on CPUs of other systems than Linux nothing can be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5\n", encoding="ascii")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory so far: of tensors on a GPU, or resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
