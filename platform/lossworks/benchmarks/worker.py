"""What measurements in processes of their own share: starting them, timing in turns, watching memory."""

import ctypes
import gc
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.benchmarks.table import BenchmarkRow
from lossworks.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

_FEWEST_TURNS = 3
_ERROR_LINE = re.compile(r"[\w.]*(Error|Exception|Interrupt|Unsupported)\w*(: |$)")


@dataclass(frozen=True)
class Measurement:
    """What one process will measure.

    Attributes:
        case: As of its rows.
        method: The same.
        measure: Gives its rows, or one that says why there are none.
    """

    case: str
    method: str
    measure: Callable[[], list[BenchmarkRow]]


def measured(measurements: Sequence[Measurement], done: Sequence[BenchmarkRow]) -> Iterator[BenchmarkRow]:
    """Measure one after the other, and yield the rows; progress goes to standard error.

    Args:
        measurements: What to measure.
        done: Figures of an earlier run, which are given again instead of being measured.
    """
    from rich.console import Console

    console = Console(stderr=True)
    for number, one in enumerate(measurements, 1):
        what = f"{number}/{len(measurements)}  {one.case}: {one.method}"
        rows = [row for row in done if (row.case, row.method) == (one.case, one.method)]
        rows = [row for row in rows if row.value is not None]
        if not rows:
            with console.status(what):
                rows = one.measure()
        figures = rows[0].note if rows[0].value is None else f"{rows[0].value:.3g} {rows[0].unit}"
        console.print(f"{what}: {figures}", markup=False, highlight=False, soft_wrap=True)
        yield from rows


def run_worker(module: str, case: Mapping[str, Any], threads: int, limit_s: float) -> dict[str, Any]:
    """Run ``python -m module CASE`` and return the JSON in its last line.

    Raises:
        RunError: It failed, or took longer than ``limit_s`` seconds.
    """
    command = [sys.executable, "-m", module, json.dumps(case)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit_s, env=environment
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"not done after limit_s={limit_s:g} seconds") from None
    if done.returncode:
        raise RunError(_why(done))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _why(done: "subprocess.CompletedProcess[str]") -> str:
    """Return the line of the traceback that names the error, or how the process ended."""
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]


def median_seconds(
    calls: Sequence[Callable[[], object]], repeats: int, device: str, enough_s: float = math.inf
) -> list[float]:
    """Return the median seconds of each; they run in turns because a machine's speed drifts.

    Args:
        calls: What to time; the first is taken to have run before.
        repeats: Turns.
        device: ``"cpu"`` or ``"cuda"``.
        enough_s: Seconds after which three turns are enough.
    """
    for call in calls[1:]:
        call()
    turns: list[list[float]] = []
    began = time.perf_counter()
    while len(turns) < repeats:
        turns.append([_seconds(call, device) for call in calls])
        if len(turns) >= _FEWEST_TURNS and time.perf_counter() - began >= enough_s:
            break
    return [statistics.median(seconds) for seconds in zip(*turns, strict=True)]


def _seconds(call: Callable[[], object], device: str) -> float:
    import torch

    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_growth(call: "Callable[[], tuple[Tensor, ...]]", device: str) -> tuple[int, str, float]:
    """Return by how many bytes ``call`` raised the peak, how that was read, and its first result."""
    import torch

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
        import torch

        from lossworks.training.measure.hardware import peak_memory_bytes

        # Where it can't be set back, an earlier peak hides growth.
        return lambda: peak_memory_bytes(torch.device("cpu")), "ru_maxrss"
    return _high_water_mark, "VmHWM"


def _high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _give_back_freed_memory() -> None:
    """Return what glibc keeps of freed blocks, which would be used again and not seen as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
