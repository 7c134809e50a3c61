"""The part of the audit that needs two processes."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lossworks.losses.audits.subject import AuditFinding, Subject, judged, subject_of
from lossworks.training.distributed.local_ranks import run_local_ranks

_GRADIENT = "gradient.pt"
_ROWS, _FIRST = 10, 4  # of which the first rank gets so many: whole bags, which are of two


def two_ranks(subject: Subject) -> AuditFinding:
    """Train one step's gradient of a small model on one process and, in unequal shares, on two."""
    if subject.indivisible:
        return AuditFinding("", None, subject.indivisible)
    alone = _gradient(subject, slice(None), distributed=False)
    with tempfile.TemporaryDirectory() as folder:
        run_local_ranks(2, _of_rank, folder, subject.name, subject.hyperparameters)
        together = torch.load(Path(folder) / _GRADIENT, weights_only=True)
    worst = float((together - alone).abs().max() / alone.abs().max().clamp(min=1e-12))
    return judged(worst, 1e-10, "relative difference of the gradients")


def _of_rank(folder: str, name: str, hyperparameters: dict[str, Any]) -> None:
    leads = dist.get_rank() == 0
    rows = slice(0, _FIRST) if leads else slice(_FIRST, None)
    gradient = _gradient(subject_of(name, hyperparameters), rows, distributed=True)
    if leads:
        torch.save(gradient, Path(folder) / _GRADIENT)


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
