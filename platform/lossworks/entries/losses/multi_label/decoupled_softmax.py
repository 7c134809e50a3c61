"""Decoupled softmax: positives that don't compete with one another.

Shapes: N rows, P positives a row.
"""

import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number, switch
from lossworks.head.label_blocks import LOG_SUM_EXP
from lossworks.losses.multi_label import StreamedMultiLabelLoss, mean_of_counted


class DecoupledSoftmax(StreamedMultiLabelLoss):
    """Decoupled softmax: each positive against the negatives alone.

    Cross-entropy averaged over positives draws each to p = 1/|P| and so pushes the easy ones down; here no
    positive is ever pushed down. With one positive a row it is cross-entropy. ``linear`` takes embeddings and
    never holds the scores of all labels.
    """

    slug = "decoupled-softmax"
    formula = "1/|P| Σ_j∈P softplus(n - s_j) with n = lse over k∉P of s_k, s = (⟨f, g⟩ + b)/τ"
    paper = Paper(
        "Dual-Encoders for Extreme Multi-Label Classification",
        "Gupta, Devvrit, Rawat, Bhojanapalli, Jain, Dhillon",
        2024,
        "section 4.2",
    )
    over_negatives = LOG_SUM_EXP

    temperature: float = number(0.05, "τ, which scores are divided by", gt=0, search=(0.01, 1), log=True)
    normalise: bool = switch(True, "embeddings are brought to unit length; scores are taken as they are")

    def of_positives(self, negatives: Tensor, own: Tensor, counted: Tensor) -> Tensor:
        """Return (1/|P|) Σ_j∈P softplus(n - s_j), with n = -∞ where there are no negatives."""
        return mean_of_counted(F.softplus(negatives[:, None] - own), counted)
