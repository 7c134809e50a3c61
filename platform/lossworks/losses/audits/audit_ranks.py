"""The part of the audit that needs two processes."""

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lossworks.losses.audits.subject import AuditFinding, Subject, judged, subject_of

_GRADIENT = "gradient.pt"
_ROWS, _FIRST = 10, 4  # of which the first rank gets so many: whole bags, which are of two


def two_ranks(subject: Subject) -> AuditFinding:
    """Train one step's gradient of a small model on one process and, in unequal shares, on two."""
    if subject.indivisible:
        return AuditFinding("", None, subject.indivisible)
    alone = _gradient(subject, slice(None), distributed=False)
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, subject.name, subject.hyperparameters)
        mp.start_processes(_rank, given, nprocs=2, start_method=_start_method())
        together = torch.load(Path(folder) / _GRADIENT, weights_only=True)
    worst = float((together - alone).abs().max() / alone.abs().max().clamp(min=1e-12))
    return judged(worst, 1e-10, "relative difference of the gradients")


def _start_method() -> str:
    """Return how ranks start: forked, where that can be, from a process that has imported what they need."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload([__name__])
    return "forkserver"


def _rank(rank: int, folder: str, name: str, hyperparameters: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    # They meet in a file: a free port might be taken before they are there.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = slice(0, _FIRST) if rank == 0 else slice(_FIRST, None)
    gradient = _gradient(subject_of(name, hyperparameters), rows, distributed=True)
    if rank == 0:
        torch.save(gradient, Path(folder) / _GRADIENT)
    dist.barrier()
    # gloo's threads may outlive the group, and abort a process that ends by itself.
    os._exit(0)


def _gradient(subject: Subject, rows: slice, *, distributed: bool) -> Tensor:
    """Return the gradient of a linear map of the predictions' last axis, by the rule of the training loop."""
    whole = subject.problem(rows=_ROWS)
    problem = whole.part(rows)
    features = problem.prediction.reshape(len(problem.prediction), -1)
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(features.shape[1], features.shape[1], bias=False, dtype=torch.float64)
    weight = layer.weight
    if distributed:
        layer = nn.parallel.DistributedDataParallel(layer)
    prediction = layer(features).reshape(problem.prediction.shape)
    total = subject.value("sum", problem.with_prediction(prediction))
    ranks = dist.get_world_size() if distributed else 1
    # Losses sum; the division by the count of all ranks is done once, and DDP averages over ranks.
    (total * ranks / _ROWS).backward()
    if not isinstance(weight, Tensor) or weight.grad is None:
        raise RuntimeError("no gradient arrived")
    return weight.grad
