"""One measurement of ``lossworks bench linear-ce`` in a process of its own.

``python -m lossworks.benchmarks.linear_ce_worker '{"n": 2048, ...}'`` takes a ``Case`` as JSON and prints the
figures as JSON on its last line. A fresh process has no caches of other methods and a peak of its own.
"""

import ctypes
import dataclasses
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lossworks.benchmarks.linear_ce_error import gradient_errors
from lossworks.benchmarks.linear_ce_inputs import DTYPES, make_inputs
from lossworks.benchmarks.linear_ce_methods import METHODS

_WARM_UP_ROWS = (32, 48)
_FEWEST_TURNS = 3


@dataclass(frozen=True)
class Case:
    """What one process measures; shapes as in ``lossworks.linear_cross_entropy``.

    ``repeats`` is how often each call is timed, or three times where that has taken ``enough_s`` seconds.
    """

    n: int
    v: int
    d: int
    distribution: str
    dtype: str
    method: str
    device: str
    threads: int
    seed: int
    repeats: int
    enough_s: float = math.inf


@dataclass(frozen=True)
class Figures:
    """What one process has measured.

    Attributes:
        forward_backward_s: Median seconds of the loss and both gradients.
        forward_s: Median seconds of the loss under ``no_grad``.
        product_s: Median seconds of E·Cᵀ with a fresh result, in the inputs' dtype.
        extra_bytes: Growth of the peak during loss and gradients, less the size of the gradients; with what
            the matrix library keeps for itself from its first large product on, some MiB.
        peak: How the peak was read.
        loss: The mean loss, nats.
        error_e: Relative error of ∂E.
        error_c: Relative error of ∂C.
    """

    forward_backward_s: float
    forward_s: float
    product_s: float
    extra_bytes: int
    peak: str
    loss: float
    error_e: float
    error_c: float


def reason_too_large(case: Case, free_bytes: int) -> str | None:
    """Return why ``case`` will not fit into the free memory of its device, or None if it will.

    Counted are the inputs as drawn in fp32, E and C with gradients and an fp32 accumulator, and the larger of
    the method's buffers and the product.
    """
    size = DTYPES[case.dtype].itemsize
    factors = (case.n + case.v) * case.d * (4 + 2 * size + 4)
    need = factors + case.n * case.v * max(4 * METHODS[case.method].copies, size)
    if need <= free_bytes:
        return None
    return f"needs about {need / 2**30:.1f} GiB of memory and {free_bytes / 2**30:.1f} GiB are free"


def measure(case: Case) -> Figures:
    """Return the figures of a case; memory comes first, before freed blocks could hide growth."""
    e, c, y = make_inputs(case.n, case.v, case.d, case.distribution, case.dtype, case.device, case.seed)
    loss = METHODS[case.method].build()

    def forward_backward() -> tuple[Tensor, ...]:
        value = loss(e, c, y)
        return value.detach(), *torch.autograd.grad(value, (e, c))

    _warm_up(loss, e, c, y)
    growth, peak, value = _peak_growth(forward_backward, case.device)
    error_e, error_c = gradient_errors(loss, e, c, y)
    both, forward, product = _times(
        case, forward_backward, torch.no_grad()(lambda: loss(e, c, y)), torch.no_grad()(lambda: e @ c.t())
    )
    return Figures(
        forward_backward_s=both,
        forward_s=forward,
        product_s=product,
        extra_bytes=max(0, growth - (e.numel() + c.numel()) * e.element_size()),
        peak=peak,
        loss=value,
        error_e=error_e,
        error_c=error_c,
    )


def _warm_up(loss: Callable[[Tensor, Tensor, Tensor], Tensor], e: Tensor, c: Tensor, y: Tensor) -> None:
    """Call the method on few rows, so that buffers made to measure appear later, where memory is watched.

    Two counts of rows, so that a compiler makes a kernel for any count now and not then.
    """
    for rows in _WARM_UP_ROWS:
        small = e[:rows].detach().clone().requires_grad_()
        torch.autograd.grad(loss(small, c, y[:rows].clone()), (small, c))


def _times(case: Case, *calls: Callable[[], object]) -> list[float]:
    """Return the median seconds of each; they run in turns because a machine's speed drifts."""
    for call in calls[1:]:
        call()  # warms up; the first call has run when its memory was measured
    turns: list[list[float]] = []
    began = time.perf_counter()
    while len(turns) < case.repeats:
        turns.append([_seconds(call, case.device) for call in calls])
        if len(turns) >= _FEWEST_TURNS and time.perf_counter() - began >= case.enough_s:
            break
    return [statistics.median(seconds) for seconds in zip(*turns, strict=True)]


def _seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _peak_growth(call: Callable[[], tuple[Tensor, ...]], device: str) -> tuple[int, str, float]:
    """Return by how many bytes ``call`` raised the peak, how that was read, and its first result."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = float(call()[0])
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated", value
    _give_back_freed_memory()
    read, name = _resident_peak()
    before = read()
    value = float(call()[0])
    return read() - before, name, value


def _resident_peak() -> tuple[Callable[[], int], str]:
    """Set the process's peak back to what is resident now, and return how to read it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        # Where it can't be set back, an earlier peak hides growth.
        return _max_resident, "ru_maxrss"
    return _high_water_mark, "VmHWM"


def _high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _max_resident() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _give_back_freed_memory() -> None:
    """Return what glibc keeps of freed blocks, which would be used again and not seen as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def main() -> None:
    """Measure the case in the first argument, or say why it was skipped."""
    case = Case(**json.loads(sys.argv[1]))
    torch.set_num_threads(case.threads)
    reason = reason_too_large(case, _free_bytes(case.device))
    result = {"skipped": reason} if reason else dataclasses.asdict(measure(case))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
