"""The head: losses on ``E·Cᵀ`` that never build the logit matrix.

The folder is not called like its function: a submodule would take the function's place as an attribute of
the package, and ``from lossworks import linear_cross_entropy`` would sometimes give a module.
"""

from lossworks.head.interface import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
