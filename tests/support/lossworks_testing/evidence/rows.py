"""Studies of the row and sequence losses."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lossworks.data import ExampleData, load_examples
from lossworks.losses import create
from lossworks.specs import ExamplesSpec
from lossworks_testing.evidence.study import Study, fit, mlp


def flat(data: ExampleData) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and held-out examples as vectors with their labels."""
    train, held_out = data.train, data.held_out
    return train.inputs.flatten(1), train.labels, held_out.inputs.flatten(1), held_out.labels


def coverage(seeds: int) -> Study:
    """Train a perceptron until it is sure of itself, and draw sixteen answers."""
    study = Study(
        "dco",
        "The more cross-entropy is trained, the less sixteen answers cover; trained for them, they do.",
        "mnist1d, 2,000 rows, 40-256-10 perceptron, 150 epochs of Adam at 0.001; held-out 1 − (1 − p_y)^N.",
    )
    for seed in range(seeds):
        x, y, held_out, labels = flat(load_examples(ExamplesSpec(source="mnist1d"), seed))
        x, y = x[:2000], y[:2000]
        for row, loss in (
            ("cross-entropy", create("cross-entropy")),
            ("dco, N = 16", _single(create("dco", samples=16))),
        ):
            model, best = mlp(40, 256, 10, seed), [0.0]
            covered = partial(_covered, model, held_out, labels)

            def look(epoch: int, best: list[float] = best, covered: Callable[[int], float] = covered) -> None:
                if epoch % 10 == 0:
                    best[0] = max(best[0], covered(16))

            fit(model, loss, x, y, epochs=150, seed=seed, lr=1e-3, each_epoch=look)
            study.add(row, "pass@1 at the end", covered(1))
            study.add(row, "pass@16, best", best[0])
            study.add(row, "pass@16 at the end", covered(16))
    return study


@torch.no_grad()
def _covered(model: nn.Module, x: Tensor, labels: Tensor, samples: int) -> float:
    p = model(x).softmax(1).gather(1, labels[:, None]).double()
    return float((1 - (1 - p) ** samples).mean())


def _single(loss: nn.Module):
    """Return a sequence loss of sequences of one token."""
    return lambda logits, labels: loss(logits[:, None], labels[:, None])
