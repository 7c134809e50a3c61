"""One measurement of ``lossworks bench post-training`` in a process of its own.

``python -m lossworks.benchmarks.post_training.post_training_worker '{"job": "dpo", ...}'`` takes a
``PostTrainingCase`` as JSON and prints the figures as JSON on its last line.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lossworks import linear_cross_entropy
from lossworks.benchmarks.post_training.trained_losses import (
    LENGTH,
    POST_TRAINING_METHODS,
    PostTrainingInputs,
    make_post_training_inputs,
)
from lossworks.benchmarks.worker import median_seconds, peak_growth


@dataclass(frozen=True)
class PostTrainingCase:
    """What one process measures; ``repeats`` and ``enough_s`` as of ``lossworks bench linear-ce``."""

    job: str
    method: str
    n: int
    v: int
    d: int
    threads: int
    seed: int
    repeats: int
    enough_s: float = math.inf


@dataclass(frozen=True)
class PostTrainingFigures:
    """What one process has measured.

    Attributes:
        seconds: Median of the loss with the gradients of E and C.
        plain_s: Median of plain linear cross-entropy of N rows, likewise, in the same turns.
        extra_bytes: Growth of the peak during loss and gradients, less the size of the gradients.
        loss: The value.
    """

    seconds: float
    plain_s: float
    extra_bytes: int
    loss: float


def measure(case: PostTrainingCase) -> PostTrainingFigures:
    """Return the figures of a case; memory comes first, before freed blocks could hide growth."""
    x = make_post_training_inputs(case.job, case.n, case.v, case.d, case.seed)
    loss = POST_TRAINING_METHODS[case.method].losses[case.job]

    def step(x: PostTrainingInputs) -> tuple[Tensor, ...]:
        value = loss(x)
        return value.detach(), *torch.autograd.grad(value, (x.e, x.c))

    def plain() -> tuple[Tensor, ...]:
        e, c, y = x.e[: case.n].detach().requires_grad_(), x.c, x.targets[: case.n]
        value = linear_cross_entropy(e, c, y)
        return torch.autograd.grad(value if isinstance(value, Tensor) else value[0], (e, c))

    step(make_post_training_inputs(case.job, LENGTH, 64, case.d, case.seed))  # what imports and caches cost
    growth, _, value = peak_growth(lambda: step(x), "cpu")
    gradients = x.e.nbytes + x.c.nbytes
    seconds, plain_s = median_seconds([lambda: step(x), plain], case.repeats, "cpu", case.enough_s)
    return PostTrainingFigures(seconds, plain_s, max(growth - gradients, 0), value)


if __name__ == "__main__":
    given = PostTrainingCase(**json.loads(sys.argv[1]))
    torch.set_num_threads(given.threads)
    print(json.dumps(asdict(measure(given))))
