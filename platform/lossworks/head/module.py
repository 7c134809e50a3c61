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
        class_weight: w, shape (V,), as in the function; a buffer of the module, saved and moved with it.
        options: Further keyword arguments of :func:`lossworks.linear_cross_entropy`, the same in every call.

    Shapes: ``forward(e, targets)`` takes (..., D) and (...), and returns what the function returns.

    Raises:
        UserError: A size is not positive, or the class weights are not one a class.

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
        class_weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, size in (("features", features), ("classes", classes)):
            if size < 1:
                raise UserError(f"{name}={size} must be at least 1")
        self.weight = nn.Parameter(torch.empty(classes, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(classes, device=device, dtype=dtype)) if bias else None
        if class_weight is not None and class_weight.shape != (classes,):
            raise UserError(f"class_weight {tuple(class_weight.shape)} must be ({classes},), one a class")
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", None if class_weight is None else class_weight.to(device))
        self.options = options
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from a normal distribution of variance 1/D, and zero the bias."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, e: Tensor, targets: Tensor, **options: Any) -> Tensor | tuple[Tensor, ...]:
        """Return the loss of ``e`` (..., D) and ``targets`` (...); ``options`` override the module's."""
        own = {"class_weight": self.class_weight, **self.options}
        return linear_cross_entropy(e, self.weight, targets, self.bias, **(own | options))

    def extra_repr(self) -> str:
        """Return the sizes and options for ``repr``."""
        sizes = (
            f"features={self.weight.shape[1]}, classes={self.weight.shape[0]}, bias={self.bias is not None}"
        )
        weighted = ["class_weight"] if self.class_weight is not None else []
        return ", ".join([sizes, *weighted, *(f"{name}={value!r}" for name, value in self.options.items())])
