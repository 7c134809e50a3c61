"""Loss on text that was held out."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lossworks.data import TokenSequences
from lossworks.models import Objective
from lossworks.training.batches import IGNORE_INDEX, largest_share, micro_batches, share
from lossworks.training.world import World


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss over all ranks.

    Attributes:
        loss: Nats a token.
        bits_per_byte: The same in bits per byte of text, comparable across vocabularies.
    """

    loss: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """Return e to the loss; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metrics(self) -> dict[str, float]:
        """Return the values under their tracked names."""
        return {
            "eval/loss": self.loss,
            "eval/bits_per_byte": self.bits_per_byte,
            "eval/perplexity": self.perplexity,
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    sequences: TokenSequences,
    token_bytes: Tensor,
    world: World,
    *,
    limit: int | None,
    micro_batch_size: int | None,
    bf16: bool,
) -> Evaluation:
    """Return the loss on ``limit`` evenly spaced held-out sequences, split over the ranks.

    Args:
        model: A distributed language model; every rank calls this.
        objective: Summed loss.
        sequences: Held-out text.
        token_bytes: UTF-8 bytes of each token, shape (V,).
        world: The ranks.
        limit: Sequences to read; None for all.
        micro_batch_size: Sequences at once; None takes a rank's share at once, at most 32.
        bf16: Run products in bfloat16.
    """
    total = min(limit or len(sequences), len(sequences))
    # Evenly spaced, or a small limit would read one document only.
    rows = (np.arange(total) * len(sequences) // total)[share(total, world)]
    sums = torch.zeros(3, dtype=torch.float64)
    model.eval()
    for tokens, targets in micro_batches(
        sequences, rows, size=micro_batch_size or 32, largest_share=largest_share(total, world)
    ):
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(tokens.to(world.device), targets.to(world.device), objective)
        sums += torch.tensor([float(loss), *count_targets(targets, token_bytes)], dtype=torch.float64)
    model.train()
    nats, tokens_seen, text_bytes = world.gather(sums.tolist()).sum(dim=0).tolist()
    return Evaluation(nats / tokens_seen, bits_per_byte(nats, text_bytes))


def count_targets(targets: Tensor, token_bytes: Tensor) -> tuple[int, float]:
    """Return how many targets are valid, and how many bytes of text they stand for."""
    valid = targets[targets != IGNORE_INDEX]
    return valid.numel(), float(token_bytes[valid].sum())


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Return a summed loss in bits over the bytes of its text; NaN where there was no text."""
    return nats / (math.log(2) * text_bytes) if text_bytes else math.nan
