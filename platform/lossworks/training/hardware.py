"""What the device can do at most, and what the process has used."""

import resource
import sys

import torch

# Dense peak FLOP/s of bfloat16 products without sparsity, from the makers' data sheets. A device that is not
# listed has no known peak, and then no utilisation is reported.
_BF16_PEAK: dict[str, float] = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(device: torch.device, *, bf16: bool) -> float | None:
    """Return the device's peak FLOP/s for the precision in use, or None where it is not known."""
    if device.type != "cuda" or not bf16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _BF16_PEAK.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory so far: of tensors on a GPU, or resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
