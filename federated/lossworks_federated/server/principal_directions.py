"""FedLD's aggregation: clients' updates along the principal directions of their disagreement.

Zeng, Guo et al., *Tackling Data Heterogeneity in Federated Learning via Loss Decomposition*, MICCAI 2024.

m clients, d entries of one layer.
"""

from typing import Literal

import torch
from torch import Tensor

UpdateRescale = Literal["none", "norm"]
_AT_ONCE = 2**18  # entries of a layer whose products are formed at a time


def principal_update(updates: Tensor, rho: float = 0.8, *, rescale: UpdateRescale = "none") -> Tensor:
    """Return the aggregated update of one layer (Zeng, Guo et al. 2024, FedLD).

    With H = G·Gᵀ/m = E·diag(s)·Eᵀ and the principal directions u_j = Gᵀe_j/‖Gᵀe_j‖, each client's
    projections on the first k = max(1, ⌊ρm⌋) of them are rescaled to ‖g_i‖·s_j/Σs. The closed form is

        update = Σ_{j≤k} (s_j/Σ s) · u_j · (1/m) Σ_i ‖g_i‖ sign(e_ij).

    Nothing of it depends on the signs of eigenvectors. Directions whose s_j is rounding, at most 4·m·ε of the
    sum with float64's ε, are left out, as are clients with a zero update or without a
    component along a direction; updates that are all zero give zero.

    The more the clients disagree the shorter is the result; never is it longer than the updates on average.
    ``rescale="norm"``, which is ours, gives it the norm of the mean update.

    Args:
        updates: G, shape (m, …), m ≥ 1, float32 or float64, finite.
        rho: ρ in (0, 1], the share of directions that is kept.
        rescale: ``none`` as in the paper, or ``norm``.

    Returns:
        Shape (…), in the dtype of the updates.
    """
    g = updates.flatten(1)
    m = len(g)
    products = _gram(g)
    values, vectors = torch.linalg.eigh(products / m)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = values.sum()
    if total == 0:
        return torch.zeros_like(updates[0])
    # What is left of nothing: products of P entries are rounded, and summed over m clients.
    tiny = 4 * m * torch.finfo(products.dtype).eps
    kept = torch.arange(m) < max(1, int(rho * m + 1e-9))
    kept &= values > tiny * total
    s, e = values[kept], vectors[:, kept]
    signs = torch.where(e.abs() > tiny, e.sign(), 0.0)
    norms = products.diagonal().clamp(min=0).sqrt()
    lengths = s / total * (norms @ signs) / m
    # u_j = Gᵀe_j/√(m s_j), so that all directions together are one product with G.
    combined = e @ (lengths / (m * s).sqrt())
    if rescale == "norm":
        length = (combined @ products @ combined).clamp(min=0).sqrt()
        mean = (products.sum() / m**2).clamp(min=0).sqrt()
        combined = combined * (mean / length if length > 0 else 0.0)
    update: Tensor = combined.to(g) @ g
    return update.reshape(updates.shape[1:])


def _gram(g: Tensor) -> Tensor:
    """Return G·Gᵀ (m, m) in float64, so that a small disagreement isn't lost beside a large mean."""
    total = g.new_zeros(len(g), len(g), dtype=torch.float64)
    for start in range(0, g.shape[1], _AT_ONCE):
        part = g[:, start : start + _AT_ONCE].double()
        total += part @ part.t()
    return total
