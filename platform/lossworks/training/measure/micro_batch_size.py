"""How many rows a worker takes at once, found by trying sizes: the fastest that memory has room for."""

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from lossworks.errors import StorageError, UserError
from lossworks.files import write_atomically
from lossworks.specs import RunSpec, TelemetrySpec
from lossworks.training.distributed.world import World
from lossworks.training.job import Job
from lossworks.training.measure.hardware import forget_peak_memory, peak_memory_bytes
from lossworks.training.planning.sizes import size_in_words

_FILE = "micro-batch-size.json"
_AT_MOST = 4  # micro-batches of a try; what a whole step takes is reckoned from them
_REPEATS = 2  # that are timed, after one that is not


@dataclass(frozen=True)
class TriedSize:
    """What taking so many rows at once costs the rank that needs most.

    Attributes:
        rows: At once.
        seconds: That the forward and backward passes of a step take.
        bytes: Of memory beyond what there is without them, when they are most.
    """

    rows: int
    seconds: float
    bytes: float


def with_rows(spec: RunSpec, rows: int) -> RunSpec:
    """Return a run that takes so many rows at once.

    Raises:
        UserError: The run can't, such as one with bags of another size.
    """
    return spec.override([f"micro_batch_size={rows}"])


def sizes_of(spec: RunSpec, share: int) -> list[int]:
    """Return the sizes that can be tried, ascending: powers of two below a worker's share, and the share."""
    powers = [2**exponent for exponent in range(share.bit_length()) if 2**exponent < share]
    return [rows for rows in powers if _takes(spec, rows)] + [share]


def _takes(spec: RunSpec, rows: int) -> bool:
    try:
        with_rows(spec, rows)
    except UserError:
        return False
    return True


def with_settled_size(job: Job, trials: Callable[[Job], list[TriedSize]]) -> tuple[Job, dict[str, float]]:
    """Return a job that takes a number of rows at once, and that number by tracked name.

    It is what the run has kept, or else what is measured now, on a run of its own that is thrown away: the
    run itself begins as if its spec had said the number. Every rank calls this and gets the same.

    Args:
        job: Whose spec leaves the size open.
        trials: Builds a run and returns what sizes cost it.

    Raises:
        StorageError: The number can't be kept.
    """
    world, folder = World.current(), job.checkpoints.folder
    rows: int | None = world.agree(_stored(folder) if world.leads else None)
    if rows is None:
        settings = {"micro_batch_size": 1, "telemetry": TelemetrySpec(), "analyses": ()}
        with torch.random.fork_rng():
            tried = trials(replace(job, spec=job.spec.model_copy(update=settings), profile=None))
        _clear_away(job.spec, world.device)
        rows = fastest(tried).rows
        _store(folder, rows, world)
        if world.leads:
            job.notify(in_words(tried))
    spec = job.spec.model_copy(update={"micro_batch_size": rows})
    return replace(job, spec=spec), {"train/micro_batch_size": float(rows)}


def _clear_away(spec: RunSpec, device: torch.device) -> None:
    """Leave nothing of the trials in the process, neither memory nor what was compiled."""
    if spec.compile:
        torch.compiler.reset()  # or what was compiled for all sizes would serve the run
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    forget_peak_memory(device)


def try_sizes(
    spec: RunSpec, attempt: Callable[[int, int], object], share: int, world: World
) -> list[TriedSize]:
    """Return what sizes cost, up to the first that memory has no room for; every rank gets the same.

    Before a size is tried, what it takes is reckoned from those before, on a line through the last two; if
    that is more than a rank has, it is not tried. A GPU that says that it is full ends the trials, too.

    Args:
        spec: The run; sizes that it can't take are left out. The smallest of the others is tried in any case.
        attempt: Called with a size and a number of micro-batches, which it takes forward and backward.
        share: Rows of a step on the rank that has most.
        world: The ranks; all of them call.
    """
    free, before = _free_bytes(world), _held_bytes(world)
    found: list[TriedSize] = []
    for rows in sizes_of(spec, share):
        least_free = float(world.gather([free]).min())
        if found and _reckoned(found, rows) > least_free:
            break
        try:
            own = (*_tried(rows, attempt, share, before, world.device), 1.0)
        except torch.OutOfMemoryError:
            if not found:
                raise
            own = (0.0, 0.0, 0.0)
        ranks = world.gather(own)
        if not bool(ranks[:, 2].all()):
            break
        found.append(TriedSize(rows, float(ranks[:, 0].max()), float(ranks[:, 1].max())))
    return found


def fastest(tried: Sequence[TriedSize]) -> TriedSize:
    """Return the size with the shortest step."""
    return min(tried, key=lambda one: one.seconds)


def in_words(tried: Sequence[TriedSize]) -> str:
    """Return what was chosen, and among what, in a sentence."""
    figures = ", ".join(
        f"{one.rows} ({one.seconds:.3g} s a step, {size_in_words(max(one.bytes, 0.0))})" for one in tried
    )
    return f"micro_batch_size=auto: {fastest(tried).rows} rows at once are fastest; tried: {figures}"


def _stored(folder: Path) -> int | None:
    """Return the size that a run has kept in a folder; None if there is none, or it can't be read."""
    try:
        rows = json.loads((folder / _FILE).read_text(encoding="utf-8"))["micro_batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rows if isinstance(rows, int) and rows >= 1 else None


def _store(folder: Path, rows: int, world: World) -> None:
    """Keep a size in a run's folder; every rank calls this.

    Raises:
        StorageError: On every rank: storage refuses.
    """
    problem = None
    if world.leads:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / _FILE, json.dumps({"micro_batch_size": rows}))
        except OSError as error:
            problem = str(error)
    if (problem := world.first(problem)) is not None:
        raise StorageError(f"{folder / _FILE}: can't be written: {problem}")


def _tried(
    rows: int, attempt: Callable[[int, int], object], share: int, before: float, device: torch.device
) -> tuple[float, float]:
    """Return the seconds of a step, and the bytes beyond those before."""
    whole = -(-share // rows)
    count = min(whole, _AT_MOST)
    forget_peak_memory(device)
    attempt(rows, count)
    seconds = min(_seconds(lambda: attempt(rows, count), device) for _ in range(_REPEATS))
    return seconds * whole / count, peak_memory_bytes(device) - before


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _reckoned(found: Sequence[TriedSize], rows: int) -> float:
    """Return the bytes that a larger size will take: in proportion to one, or on a line through two."""
    last = found[-1]
    if len(found) == 1:
        return last.bytes * rows / last.rows
    older = found[-2]
    slope = max(last.bytes - older.bytes, 0.0) / (last.rows - older.rows)
    return last.bytes + slope * (rows - last.rows)


def _held_bytes(world: World) -> float:
    """Return the memory that is in use: of tensors on a GPU, or of the process."""
    if world.device.type == "cuda":
        return float(torch.cuda.memory_allocated(world.device))
    return float(psutil.Process().memory_info().rss)


def _free_bytes(world: World) -> float:
    """Return this rank's part of what is free: all of its GPU, or an equal part of its machine."""
    if world.device.type == "cuda":
        kept = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return float(torch.cuda.mem_get_info(world.device)[0] + kept)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return psutil.virtual_memory().available / here
