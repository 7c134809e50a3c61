"""Binary cross-entropy of every label: each is a question of its own, one against all.

Shapes: N rows, P positives a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number, switch
from lossworks.head.label_blocks import SOFTPLUS_SUM
from lossworks.losses.multi_label import StreamedMultiLabelLoss


class BinaryCrossEntropy(StreamedMultiLabelLoss):
    """Binary cross-entropy summed over labels, each against all others: whether it is one of the row's.

    A score is the logit of its label's probability. Over N rows and L labels the sum is N·L times the mean
    that is common elsewhere. ``linear`` never holds the scores of all labels.
    """

    slug = "binary-cross-entropy"
    formula = "w Σ_j∈P log(1 + exp(-s_j)) + Σ_k∉P log(1 + exp(s_k)) with s = (⟨f, g⟩ + b)/τ"
    paper = Paper(
        "Large-scale Multi-label Text Classification: Revisiting Neural Networks",
        "Nam, Kim, Loza Mencía, Gurevych, Fürnkranz",
        2014,
        "cross-entropy error; one label against all others as in Rifkin and Klautau 2004",
    )
    invariances = ()
    over_negatives = SOFTPLUS_SUM

    positive_weight: float = number(
        1.0,
        "w: weight of a positive's loss beside a negative's; above 1 finds more of them, and more wrong ones",
        gt=0,
        search=(0.1, 100),
        log=True,
    )
    temperature: float = number(1.0, "τ, which scores are divided by", gt=0)
    normalise: bool = switch(False, "embeddings are brought to unit length; scores are taken as they are")
    empty_rows: bool = switch(
        False, "a row without positives counts as one whose labels are all negative, not as unlabelled"
    )

    def kept(self, counted: Tensor) -> Tensor:
        """See :meth:`MultiLabelLoss.kept`."""
        return counted.new_ones(counted.shape[:-1]) if self.empty_rows else super().kept(counted)

    def of_positives(self, negatives: Tensor, own: Tensor, counted: Tensor) -> Tensor:
        """Return the weighted sum of the logistic losses of positives and negatives."""
        return self.positive_weight * torch.where(counted, F.softplus(-own), 0).sum(1) + negatives
