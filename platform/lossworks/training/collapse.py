"""Neural collapse of a classifier in training, measured on its training examples over all ranks.

K classes, D features.
"""

import numpy as np
import torch
from torch import Tensor

from lossworks.entries.analyses.neural_collapse import MATRICES, ClassMoments
from lossworks.losses import create
from lossworks.models import Head
from lossworks.training.batches import IGNORE_INDEX
from lossworks.training.task import Rows, Sums, as_sums

_LARGEST = 100  # classes whose Gram matrices are kept for the picture


def measure_collapse(
    data: Rows, classes: int, over: Sums
) -> tuple[dict[str, float], dict[str, list[list[float]]]]:
    """Return NC1 to NC4 by name, and the Gram matrices found and predicted, without those of many classes.

    Args:
        data: The training examples.
        classes: K.
        over: Sums over rows and ranks; see :class:`lossworks.training.task.Task`.

    Raises:
        UserError: A class has no example.
    """
    entry = create("neural-collapse")
    weights: list[Tensor] = []

    def moments_of(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        # Inside the forward, where a sharded head is whole.
        weights[:] = [head.weight.detach().clone()]
        valid = targets != IGNORE_INDEX
        found = ClassMoments.of(hidden[valid], targets[valid], classes)
        return torch.cat((found.counts, found.sums.flatten(), found.second.flatten()))

    rows = np.arange(len(data))
    sums = over(moments_of, data, rows)
    weight = weights[0]
    width = weight.shape[1]
    counts, means, second = sums.split([classes, classes * width, width * width])
    moments = ClassMoments(counts, means.reshape(classes, width), second.reshape(width, width))

    def disagreements(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        valid = hidden[targets != IGNORE_INDEX]
        share = entry.disagreement(valid, moments, head.weight, head.bias) if len(valid) else 0.0
        return as_sums(share * len(valid), like=hidden)

    expected = entry.expect(counts)
    measures = entry.measure(moments, weight, expected)
    measures["nc4"] = float(over(disagreements, data, rows)) / len(data)
    if classes > _LARGEST:
        return measures, {}
    pair = dict(zip(("found", "predicted"), entry.grams(moments, weight, expected), strict=True))
    return measures, {
        f"{which} {name}": getattr(grams, name).tolist() for which, grams in pair.items() for name in MATRICES
    }
