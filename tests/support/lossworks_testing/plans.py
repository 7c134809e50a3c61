"""What a run's tensors really take at their peak; new processes import it."""

import gc
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from lossworks.specs import RunSpec
from lossworks.tasks import parse_train_spec
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.job import Job
from lossworks.training.loop import Trainer
from lossworks.training.measure.memory import peak_bytes


def measured_peaks(runs: list[tuple[dict[str, Any], str | None, str]]) -> list[int]:
    """Train each (spec, prepared folder, folder for checkpoints); return the most bytes on this rank."""
    return [_measured(parse_train_spec(values), prepared, folder) for values, prepared, folder in runs]


def _measured(spec: RunSpec, prepared: str | None, folder: str) -> int:
    """Train, and return the most bytes that were alive.

    In one process torch's profiler tells every allocation and release of the allocator, also those inside of
    operators. It does not see what gloo's threads release, so that of several ranks storages are followed.
    """
    job = Job(
        spec=spec,
        prepared=Path(prepared) if prepared else None,
        checkpoints=CheckpointStore(Path(folder), keep=1),
        record=lambda *_: None,
    )
    if dist.is_initialized():
        return peak_bytes(lambda: Trainer(job).run())
    gc.collect()  # what an earlier run has left would count as released by this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        Trainer(job).run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
