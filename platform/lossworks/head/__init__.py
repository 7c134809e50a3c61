"""The head: losses on ``E·Cᵀ`` that never build the logit matrix.

The folder is not called like its function: a submodule would take the function's place as an attribute of
the package, and ``from lossworks import linear_cross_entropy`` would sometimes give a module.
"""

from lossworks.head.core.low_rank import LowRankClassifier, QuantizedClassifier
from lossworks.head.core.vocab_parallel import VocabParallel
from lossworks.head.cross_entropy import linear_cross_entropy
from lossworks.head.module import LinearCrossEntropy
from lossworks.head.predictions import TopK, linear_log_probabilities, linear_top_k
from lossworks.head.row_loss import linear_row_loss
from lossworks.head.row_statistics import linear_row_statistics, row_statistics
from lossworks.head.statistics import (
    Divergence,
    ExpectedLogit,
    Gathered,
    LogSumExp,
    Mean,
    Predicted,
    SumOfSquares,
    Target,
    TeacherExpectedLogit,
    TopKDivergence,
    Variance,
)
from lossworks.head.teacher_loss import linear_teacher_loss

__all__ = [
    "Divergence",
    "ExpectedLogit",
    "Gathered",
    "LinearCrossEntropy",
    "LogSumExp",
    "LowRankClassifier",
    "Mean",
    "Predicted",
    "QuantizedClassifier",
    "SumOfSquares",
    "Target",
    "TeacherExpectedLogit",
    "TopK",
    "TopKDivergence",
    "Variance",
    "VocabParallel",
    "linear_cross_entropy",
    "linear_log_probabilities",
    "linear_row_loss",
    "linear_row_statistics",
    "linear_teacher_loss",
    "linear_top_k",
    "row_statistics",
]
