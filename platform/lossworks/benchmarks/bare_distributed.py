"""The baseline of ``lossworks bench train``: DistributedDataParallel, a dense head, and nothing else.

A script that a person would write by hand and start with torchrun, with the same model, optimiser, batches
and evaluation-free steps as ours: ``torchrun --nproc-per-node 2 -m lossworks.benchmarks.bare_distributed
SPEC.yaml CORPUS_FOLDER RESULT.json``. Rank 0 writes the seconds and the loss of every step.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lossworks.data import SequenceOrder, TokenizedCorpus
from lossworks.data.batch import Batch
from lossworks.models import Outputs, build_model
from lossworks.tasks.text.language_model import TrainSpec
from lossworks.training.optimizer import build_optimizers


def dense_cross_entropy(outputs: Outputs, batch: Batch) -> Tensor:
    """Return the mean cross-entropy, a scalar, with all logits built, as most training scripts do."""
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), batch["targets"].flatten())


def main() -> None:
    """Train ``spec.steps`` steps and write ``{"seconds": [...], "losses": [...]}`` on rank 0."""
    spec = TrainSpec.read(sys.argv[1])
    corpus = TokenizedCorpus.open(sys.argv[2])
    dist.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, int(spec.resources_per_worker.get("CPU", 1))))
    text, _ = corpus.split(spec.text())
    order = SequenceOrder(len(text), spec.batch_size, spec.seed)
    model = DistributedDataParallel(build_model(spec.model, vocab_size=corpus.vocab_size, seed=spec.seed))
    optimizers = build_optimizers(model, spec.optimizer)
    seconds: list[float] = []
    losses: list[Tensor] = []
    for step in range(spec.steps):
        started = time.perf_counter()
        batch = text.batch(order.rows(step * spec.batch_size, rank, workers))
        loss = model(batch, dense_cross_entropy)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.optimizer.clip_norm or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        losses.append(loss.detach() / workers)
    everywhere = torch.stack(losses)
    dist.all_reduce(everywhere)
    if rank == 0:
        Path(sys.argv[3]).write_text(json.dumps({"seconds": seconds, "losses": everywhere.tolist()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
