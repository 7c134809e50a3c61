"""The head as a module."""

from typing import Any

import torch
from torch import Tensor, nn

from lossworks.errors import UserError
from lossworks.head.cross_entropy import linear_cross_entropy


class LinearCrossEntropy(nn.Module):
    """A linear classifier with its cross-entropy: ``torch.nn.Linear`` and the loss in one, without logits.

    Args:
        features: D.
        classes: V.
        bias: Whether the classifier has a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        options: Keyword arguments of :func:`lossworks.linear_cross_entropy`, the same in every call.

    Shapes: ``forward(e, targets)`` takes (..., D) and (...), and returns what the function returns.

    Raises:
        UserError: A size is not positive.

    Example:
        >>> head = LinearCrossEntropy(4, 10, label_smoothing=0.1)
        >>> head(torch.zeros(3, 4), torch.tensor([0, 1, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, size in (("features", features), ("classes", classes)):
            if size < 1:
                raise UserError(f"{name}={size} must be at least 1")
        self.weight = nn.Parameter(torch.empty(classes, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(classes, device=device, dtype=dtype)) if bias else None
        self.options = options
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from a normal distribution of variance 1/D, and zero the bias."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, e: Tensor, targets: Tensor, **options: Any) -> Tensor | tuple[Tensor, ...]:
        """Return the loss of ``e`` (..., D) and ``targets`` (...); ``options`` override the module's."""
        return linear_cross_entropy(e, self.weight, targets, self.bias, **(self.options | options))

    def extra_repr(self) -> str:
        """Return the sizes and options for ``repr``."""
        sizes = (
            f"features={self.weight.shape[1]}, classes={self.weight.shape[0]}, bias={self.bias is not None}"
        )
        return ", ".join([sizes, *(f"{name}={value!r}" for name, value in self.options.items())])
