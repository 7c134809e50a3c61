"""What the head takes at its peak, beside what building the logits would have taken."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lossworks.head import linear_cross_entropy
from lossworks.models import HeadedModel
from lossworks.tasks.interface import Task
from lossworks.training.distributed.world import World
from lossworks.training.measure.memory import peak_bytes

OURS, DENSE = "linear cross-entropy", "with logits"


def measure_head_memory(task: Task, model: HeadedModel, world: World) -> dict[str, float]:
    """Return the peak bytes of one micro-batch's loss and gradients on the head, by method.

    Ours is run for real, with a vocabulary-parallel head on a rank's classes and all ranks' rows; the dense
    formula is run on torch's meta device, which follows shapes and frees without taking memory, since it
    might not fit. Only rank 0 measures; others return an empty mapping, as for tasks whose heads are small.
    """
    rows = task.head_rows(world.size)
    if not world.leads or rows is None:
        return {}
    whole = (rows, *model.head().weight.shape)
    return {
        OURS: float(own_head_peak(task, model, world)),
        DENSE: float(head_peak(whole, with_logits, torch.device("meta"))),
    }


def own_head_peak(task: Task, model: HeadedModel, world: World) -> int:
    """Return the peak bytes of our head on one rank's micro-batch; 0 for tasks whose heads are small."""
    rows = task.head_rows(world.size)
    if rows is None:
        return 0
    classes, width = model.head().weight.shape
    ranks = world.size if task.spec_of_run.sharding.vocab_parallel else 1
    return head_peak((rows * ranks, -(-classes // ranks), width), without_logits, world.device)


def without_logits(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of our head."""
    loss = linear_cross_entropy(e, c, targets, reduction="sum")
    return loss if isinstance(loss, Tensor) else loss[0]


def with_logits(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """Return the same as most training scripts do."""
    return functional.cross_entropy(functional.linear(e, c), targets, reduction="sum")


def head_peak(
    shape: tuple[int, ...], loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device
) -> int:
    """Return the peak bytes of loss and gradients for N, V, D in float32, inputs left out."""
    n, v, d = shape
    e = torch.zeros(n, d, device=device, requires_grad=True)
    c = torch.zeros(v, d, device=device, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int64, device=device)

    def run() -> tuple[Tensor, ...]:
        loss = loss_of(e, c, targets)
        return torch.autograd.grad(loss, (e, c))

    return peak_bytes(run)
