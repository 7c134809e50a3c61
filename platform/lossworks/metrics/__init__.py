"""Yardsticks: figures by which models trained with different losses can be compared."""

from lossworks.metrics.classification import ClassSums, auroc, class_sums, correctness_auroc

__all__ = ["ClassSums", "auroc", "class_sums", "correctness_auroc"]
