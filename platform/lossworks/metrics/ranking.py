"""How well scores rank a row's labels first, from sums that add up."""

import torch
from torch import Tensor

DEPTHS = (1, 3, 5)


def ranking_sums(best: Tensor, positives: Tensor, ignore_index: int = -100) -> Tensor:
    """Return rows, hits at depths 1, 3 and 5, recalls at 5 and nDCG at 5 of a batch, float64 (6,).

    Args:
        best: Labels with the highest scores, the highest first, shape (N, k), k at most 5.
        positives: A row's labels, padded, shape (N, P); rows without any count for nothing.
        ignore_index: The padding.
    """
    counted = positives != ignore_index
    kept = counted.any(1)
    best, positives, counted = best[kept], positives[kept], counted[kept]
    hits = ((best[:, :, None] == positives[:, None]) & counted[:, None]).any(2).double()
    discounts = 1 / torch.arange(2, best.shape[1] + 2, dtype=torch.float64, device=best.device).log2()
    own = counted.sum(1).clamp(max=best.shape[1])
    ideal = discounts.cumsum(0)[own - 1] if len(own) else discounts[:0]
    sums = [torch.tensor(float(len(best)), dtype=torch.float64, device=best.device)]
    sums += [(hits[:, :depth].sum(1) / depth).sum() for depth in DEPTHS]
    sums += [(hits.sum(1) / counted.sum(1)).sum(), ((hits * discounts).sum(1) / ideal).sum()]
    return torch.stack(sums)


def ranking_metrics(sums: Tensor) -> dict[str, float]:
    """Return precision at 1, 3 and 5, recall at 5 and nDCG at 5 from sums over all rows.

    nDCG is Σ_i hit_i/log₂(i + 1) over what the best order would have (Järvelin and Kekäläinen, *Cumulated
    gain-based evaluation of IR techniques*, 2002).
    """
    rows = max(float(sums[0]), 1.0)
    names = [*(f"precision_at_{depth}" for depth in DEPTHS), "recall_at_5", "ndcg_at_5"]
    return {name: float(value) / rows for name, value in zip(names, sums[1:], strict=True)}
