"""Lossworks: the loss as a first-class part of machine learning.

``import lossworks`` is light; torch is imported when a function that needs it is first used.
"""

from typing import TYPE_CHECKING, Any

from lossworks.home import switch_off_usage_reports

if TYPE_CHECKING:
    from lossworks.head import linear_cross_entropy

__version__ = "0.1.0"
__all__ = ["__version__", "linear_cross_entropy"]

switch_off_usage_reports()


def __getattr__(name: str) -> Any:
    """Import ``linear_cross_entropy``, and torch with it, on first use."""
    if name == "linear_cross_entropy":
        from lossworks.head import linear_cross_entropy

        return linear_cross_entropy
    raise AttributeError(f"module 'lossworks' has no attribute {name!r}")
