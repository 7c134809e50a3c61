"""Lossworks: the loss as a first-class part of machine learning.

``import lossworks`` is light: torch is imported when a function that needs it is first used. It changes
nothing in the process; what other libraries read from the environment is settled by the command line, and
where they are started.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossworks.head import (
        Divergence,
        ExpectedLogit,
        Gathered,
        LinearCrossEntropy,
        LogSumExp,
        LowRankClassifier,
        Mean,
        Predicted,
        QuantizedClassifier,
        SumOfSquares,
        Target,
        TeacherExpectedLogit,
        TopKDivergence,
        Variance,
        VocabParallel,
        linear_cross_entropy,
        linear_log_probabilities,
        linear_row_loss,
        linear_row_statistics,
        linear_teacher_loss,
        linear_top_k,
    )
    from lossworks.patching.causal_models import patch

__version__ = "0.1.0"
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
    "TopKDivergence",
    "Variance",
    "VocabParallel",
    "__version__",
    "linear_cross_entropy",
    "linear_log_probabilities",
    "linear_row_loss",
    "linear_row_statistics",
    "linear_teacher_loss",
    "linear_top_k",
    "patch",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and torch with it, on first use."""
    if name == "patch":
        from lossworks.patching.causal_models import patch

        return patch
    if name in __all__:
        from lossworks import head

        return getattr(head, name)
    raise AttributeError(f"module 'lossworks' has no attribute {name!r}")
