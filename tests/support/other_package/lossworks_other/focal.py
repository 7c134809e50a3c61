"""Focal loss, a function of a row's target logit and logsumexp."""

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Case, Paper, number
from lossworks.losses import RowLoss


class Focal(RowLoss):
    """Focal loss: cross-entropy that weighs sure answers less.

    At γ = 0 it is cross-entropy.
    """

    slug = "focal"
    formula = "(1-p_y)^γ (lse - z_y)"
    paper = Paper("Focal Loss for Dense Object Detection", "Lin et al.", 2017, "equation 4")
    cases = (Case({"gamma": 0.0}, "cross-entropy"),)
    invariances = ("shift",)

    gamma: float = number(2.0, "γ: 0 is cross-entropy", ge=0, search=(0, 5))

    def phi(self, target: Tensor, logsumexp: Tensor, classes: int) -> Tensor:  # noqa: ARG002
        surprise = logsumexp - target
        # Away from 0, where a root's derivative is infinite.
        return (-torch.expm1(-surprise)).clamp(min=1e-12) ** self.gamma * surprise
