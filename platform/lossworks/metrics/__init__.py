"""Yardsticks: figures by which models trained with different losses can be compared."""

from lossworks.metrics.betti_matching import betti_matching_error
from lossworks.metrics.classification import ClassSums, auroc, class_sums, correctness_auroc

__all__ = ["ClassSums", "auroc", "betti_matching_error", "class_sums", "correctness_auroc"]
