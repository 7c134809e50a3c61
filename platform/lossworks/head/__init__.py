"""The head: losses on ``E·Cᵀ`` that never build the logit matrix.

The folder is not called like its function: a submodule would take the function's place as an attribute of
the package, and ``from lossworks import linear_cross_entropy`` would sometimes give a module.
"""

from lossworks.head.folded import linear_row_loss
from lossworks.head.interface import linear_cross_entropy
from lossworks.head.module import LinearCrossEntropy
from lossworks.head.predictions import TopK, linear_log_probabilities, linear_top_k
from lossworks.head.statistics import (
    ExpectedLogit,
    Gathered,
    LogSumExp,
    Mean,
    SumOfSquares,
    Target,
    TeacherExpectedLogit,
    Variance,
    linear_row_statistics,
    row_statistics,
)
from lossworks.head.vocabulary import VocabParallel

__all__ = [
    "ExpectedLogit",
    "Gathered",
    "LinearCrossEntropy",
    "LogSumExp",
    "Mean",
    "SumOfSquares",
    "Target",
    "TeacherExpectedLogit",
    "TopK",
    "Variance",
    "VocabParallel",
    "linear_cross_entropy",
    "linear_log_probabilities",
    "linear_row_loss",
    "linear_row_statistics",
    "linear_top_k",
    "row_statistics",
]
