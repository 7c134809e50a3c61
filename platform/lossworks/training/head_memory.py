"""What the head takes at its peak, beside what building the logits would have taken."""

import torch
from torch import Tensor

from lossworks.head import linear_cross_entropy
from lossworks.models import LanguageModel
from lossworks.specs import TrainSpec
from lossworks.training.batches import largest_share
from lossworks.training.memory import peak_bytes
from lossworks.training.world import World

OURS, DENSE = "linear cross-entropy", "with logits"


def measure_head_memory(spec: TrainSpec, model: LanguageModel, world: World) -> dict[str, float]:
    """Return the peak bytes of one micro-batch's loss and gradients on the head, by method.

    Ours is run for real, with a vocabulary-parallel head on a rank's classes and all ranks' rows; the dense
    formula is run on torch's meta device, which follows shapes and frees without taking memory, since it
    might not fit. Only rank 0 measures; others return an empty mapping.
    """
    if not world.leads:
        return {}
    sequences = min(spec.micro_batch_size or spec.batch_size, largest_share(spec.batch_size, world))
    rows, (classes, width) = sequences * spec.data.sequence_length, model.head().weight.shape
    ranks = world.size if spec.sharding.vocab_parallel else 1
    own = (rows * ranks, -(-classes // ranks), width)
    return {
        OURS: float(head_peak(own, "auto", world.device)),
        DENSE: float(head_peak((rows, classes, width), "reference", torch.device("meta"))),
    }


def head_peak(shape: tuple[int, ...], impl: str, device: torch.device) -> int:
    """Return the peak bytes of loss and gradients for N, V, D in float32, inputs left out."""
    n, v, d = shape
    e = torch.zeros(n, d, device=device, requires_grad=True)
    c = torch.zeros(v, d, device=device, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int64, device=device)

    def run() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(e, c, targets, reduction="sum", impl=impl)  # type: ignore[arg-type]
        return torch.autograd.grad(loss, (e, c))

    return peak_bytes(run)
