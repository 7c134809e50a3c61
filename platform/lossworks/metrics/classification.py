"""Accuracy, cross-entropy, calibration and yardsticks of unequal classes, from sums that add up.

Means don't add over micro-batches, ranks or clients, and the calibration error is no mean at all; so what is
passed around are the sums that all of them are made of.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15


@dataclass(frozen=True, eq=False)
class ClassSums:
    """Sums over examples, as one vector of 4 + 3·15 + 3·K float64, K classes.

    Attributes:
        values: Examples, cross-entropy in nats, right answers, Brier scores; then for every bin of top-1
            confidence how many examples, their confidences, and how many are right; then for every class how
            many examples are of it, are answered with it, and are both.
    """

    values: Tensor

    @property
    def examples(self) -> float:
        """How many examples."""
        return float(self.values[0])

    def bins(self) -> Tensor:
        """Return (3, 15): count, sum of confidences, right answers; bin b holds (b/15, (b+1)/15]."""
        return self.values[4 : 4 + 3 * BINS].reshape(3, BINS)

    def classes(self) -> Tensor:
        """Return (3, K): examples of a class, answers with it, right answers."""
        return self.values[4 + 3 * BINS :].reshape(3, -1)

    def reliability(self) -> dict[str, list[float]]:
        """Return the reliability curve: by bin, without the empty ones, from the least sure to the surest.

        Returns:
            ``examples``, how many; ``confidence``, their mean top-1 confidence; ``accuracy``, the share that
            is right. On the diagonal the two are equal; ECE is their mean distance, weighted by ``examples``.
        """
        count, confidence, accurate = (column[self.bins()[0] > 0] for column in self.bins())
        return {
            "examples": count.tolist(),
            "confidence": (confidence / count).tolist(),
            "accuracy": (accurate / count).tolist(),
        }

    def metrics(self) -> dict[str, float]:
        """Return cross-entropy (nats), accuracy, ECE, Brier score, balanced accuracy and macro F1.

        ECE is Σ_b (n_b/n)·|accuracy_b − confidence_b| over 15 equal bins of the top-1 confidence (Guo et al.,
        *On Calibration of Modern Neural Networks*, 2017, equation 3). The Brier score is Σ_k (p_k − [k=y])²,
        from 0 to 2 (Brier 1950). The balanced accuracy is the mean over classes of the recall, the share of a
        class's examples that is answered with it; the macro F1 is the mean over classes of
        2·right/(examples + answers). Classes without examples count in neither.
        """
        n = max(self.examples, 1.0)
        actual, answered, found = self.classes()
        present = actual > 0
        recall = (found / actual)[present]
        f1 = (2 * found / (actual + answered))[present]
        _, nats, right, brier = self.values[:4].tolist()
        _, confidence, accurate = self.bins()
        return {
            "cross_entropy": nats / n,
            "accuracy": right / n,
            "ece": float((accurate - confidence).abs().sum()) / n,
            "brier": brier / n,
            "balanced_accuracy": float(recall.mean()) if len(recall) else 0.0,
            "macro_f1": float(f1.mean()) if len(f1) else 0.0,
        }


def class_sums(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> ClassSums:
    """Return the sums of a batch.

    Args:
        logits: Shape (N, K).
        targets: Classes or ``ignore_index``, int64, shape (N,).
        ignore_index: Target of examples that don't count.
    """
    valid = targets != ignore_index
    z, y = logits[valid].double(), targets[valid]
    log_p = z.log_softmax(1)
    p = log_p.exp()
    confidence, answer = p.max(1)
    right = (answer == y).double()
    brier = (p - F.one_hot(y, z.shape[1])).square().sum(1)
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    ones = torch.ones_like(right)
    sums = [ones.sum(), F.nll_loss(log_p, y, reduction="sum"), right.sum(), brier.sum()]
    bins = [right.new_zeros(BINS).index_add(0, place, column) for column in (ones, confidence, right)]
    counted = ((y, ones), (answer, ones), (y, right))
    classes = [torch.bincount(own, weights, z.shape[1]) for own, weights in counted]
    return ClassSums(torch.cat((torch.stack(sums), *bins, *classes)))


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Return the chance that a positive scores above a negative, ties counting one half; NaN without both.

    Args:
        scores: Shape (N,).
        positive: Shape (N,), bool.
    """
    positives, negatives = scores[positive].double(), scores[~positive].double()
    if not len(positives) or not len(negatives):
        return float("nan")
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives, right=False)
    up_to = torch.searchsorted(ordered, positives, right=True)
    return float((below + up_to).double().mean() / 2 / len(negatives))


def correctness_auroc(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> float:
    """Return how well the top-1 confidence tells right answers from wrong ones: their AUROC.

    It ranks all examples against one another, so it has no sums that add over parts. NaN where all answers
    are right, or all wrong.

    Args:
        logits: Shape (N, K).
        targets: Classes or ``ignore_index``, int64, shape (N,).
        ignore_index: Target of examples that don't count.
    """
    valid = targets != ignore_index
    confidence, answer = logits[valid].double().softmax(1).max(1)
    return auroc(confidence, answer == targets[valid])
