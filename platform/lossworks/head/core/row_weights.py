"""Everything that weighs a row of a cross-entropy, brought together: targets, classes, tokens, the mean."""

import torch
from torch import Tensor

from lossworks.head.core.arguments import Operands, Options, all_classes
from lossworks.head.core.row_formulas import CrossEntropyFormula


def split_targets(
    targets: Tensor, class_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Return the targets (N,), none of them ignored if they are soft, and soft ones (N, V), weighted."""
    if not targets.is_floating_point():
        return targets.reshape(-1), None
    q = targets.detach().reshape(-1, targets.shape[-1])
    flat = torch.full((len(q),), ignore_index + 1, device=q.device)
    return flat, q if class_weight is None else q * class_weight.detach()


def weighted_rows(
    head: Operands,
    targets: Tensor,
    probabilities: Tensor | None,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    *,
    smoothing: float,
    z_loss: float,
    mean: bool,
    options: Options,
) -> tuple[CrossEntropyFormula, Tensor | None]:
    """Bring everything that weighs a row together, the mean's divisor included; ignored rows weigh 0.

    Of float16 the mean's divisor stays apart: 1/N times a probability is below the smallest float16, and a
    gradient scaler, which would lift it, comes too late.

    Args:
        head: E, C and bias.
        targets: Shape (N,), int64.
        probabilities: Soft targets, shape (N, V), weighted by class, or None.
        token_weight: Of N elements, or None for 1.
        class_weight: Shape (V,), or None for 1.
        smoothing: α, the share of the target that all classes have alike.
        z_loss: λ, the weight of the squared logsumexp.
        mean: Whether to divide by the sum of the targets' weights.
        options: What the caller chose.

    Returns:
        The formula, and what the sum is to be multiplied by, or None for 1.
    """
    wide = torch.promote_types(head.e.dtype, torch.float32)
    valid = targets != options.ignore_index
    row = valid.to(wide)
    if token_weight is not None:
        row = torch.where(valid, token_weight.detach().reshape(-1).to(wide), 0)
    nll_weight = row
    if class_weight is not None:
        class_weight = class_weight.detach().to(wide)
        if probabilities is None:
            # Clamped, since targets out of range are refused later, by name.
            nll_weight = row * class_weight[torch.where(valid, targets, 0).clamp(0, len(class_weight) - 1)]
    scale = None
    if mean:
        divisor = nll_weight.sum()
        scale = torch.where(divisor != 0, 1 / divisor, 0)  # of weights of both signs, below 0 as well
        if head.e.dtype != torch.float16:
            row, nll_weight, scale = row * scale, nll_weight * scale, None
    lse_weight = total_weight = None
    if smoothing:
        classes = all_classes(head)
        total_weight = row * (smoothing / classes)
        lse_weight = total_weight * (classes if class_weight is None else class_weight.sum())
    formula = CrossEntropyFormula(
        nll_weight * (1 - smoothing),
        lse_weight,
        total_weight,
        row * z_loss if z_loss else None,
        None if probabilities is None else probabilities.sum(1, dtype=wide),
        class_weight if smoothing else None,
        options.temperature,
    )
    return formula, scale
