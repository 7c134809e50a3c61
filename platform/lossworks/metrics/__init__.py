"""Yardsticks: figures by which models trained with different losses can be compared."""

from lossworks.metrics.classification import ClassSums, auroc, class_sums

__all__ = ["ClassSums", "auroc", "class_sums"]
