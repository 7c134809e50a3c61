"""FedBN (Li et al. 2021)."""

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper
from lossworks.cohort import Member, Stack
from lossworks_federated.strategies.interface import Federated, Reproducible
from lossworks_federated.strategies.parts import Cohort, Part, PartOutcome

_OF_NORMS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class LocalNormsPart(Part):
    """Keeps scale and shift of normalisation layers in the client, which trains and tests with its own.

    Our classifiers normalise by GroupNorm, which has no running statistics; those of an app that has some
    stay in the client, too.
    """

    slug = "fedbn"
    keeps = True

    def initial(self, origin: Member) -> Member:
        """Return the global ones, with which a client begins."""
        return {name: value for name, value in origin.items() if is_norm(name, origin)}

    def start(self, params: Stack, kept: Stack) -> Stack:
        """Put the client's own in place of the global ones."""
        return {**params, **kept}

    def finish(self, cohort: Cohort, ended: Stack, steps: Tensor) -> PartOutcome:
        """Return the client's own, to keep."""
        del steps
        return PartOutcome(kept={name: ended[name] for name in cohort.kept})

    def returned(self, origin: Member, ended: Stack) -> Stack:
        """Send the global ones back, so that an average leaves them as they are."""
        return {
            name: origin[name].expand_as(value) if is_norm(name, origin) else value
            for name, value in ended.items()
        }


class FedBN(Federated, Reproducible):
    """FedAvg of all but the normalisation layers, which every client keeps for itself."""

    slug = "fedbn"
    formula = "w = Σ p_i w_i of all but normalisation layers"
    paper = Paper(
        "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", "Li et al.", 2021
    )
    part = LocalNormsPart
    averages = True


def is_norm(name: str, member: Member) -> bool:
    """Return whether an entry is scale, shift or a running statistic of a normalisation layer.

    The layer's weight has one axis; a linear or convolutional layer's has more.
    """
    layer, _, leaf = name.rpartition(".")
    weight = member.get(f"{layer}.weight")
    return leaf in _OF_NORMS and weight is not None and torch.Tensor.dim(weight) == 1
