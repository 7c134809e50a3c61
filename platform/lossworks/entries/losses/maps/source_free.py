"""Source-free adaptation of a segmenter: sure pixels, and classes in the shares that are expected.

Shapes: B images, K classes, H by W pixels, |Ω| of which count.
"""

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, choice, number, numbers
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.losses.maps import MapLoss, Maps, pixel_means

_LEAST = 1e-10  # of an expected share, whose logarithm is taken
_PRIORS = "priors"


def log_shares(log_p: Tensor, valid: Tensor) -> Tensor:
    """Return log τ̂_k = log (1/|Ω|) Σ_i p_ik of log-probabilities (B, K, H, W), shape (B, K).

    Args:
        log_p: Of the classes.
        valid: Which pixels count, bool, shape (B, H, W).
    """
    counted = log_p.masked_fill(~valid[:, None], -torch.inf).flatten(2)
    pixels = valid.flatten(1).sum(1).clamp(min=1)
    known = valid.flatten(1).any(1)[:, None, None]
    # Chosen before the logsumexp, whose gradient is NaN where no pixel counts.
    return torch.where(known, counted, 0).logsumexp(2) - pixels.to(log_p).log()[:, None]


def clamped(priors: Tensor) -> Tensor:
    """Return expected shares (B, K) as a distribution without zeros."""
    positive = priors.clamp(min=_LEAST)
    return positive / positive.sum(-1, keepdim=True)


class SourceFree(MapLoss):
    """Source-free adaptation: pixels become sure, while classes keep the shares that are expected of them.

    It trains a segmenter that has learnt elsewhere (``start``) on images without masks: of the targets it
    reads only which pixels count. Without the second part (``prior_weight=0``) it ends at one class for all.
    Expected shares are those of ``prior``, or come with each image as ``priors`` (``data.priors``), where the
    share of a class that is known to be absent is 0. With equal shares it maximises the mutual information of
    pixel and class. Models here have GroupNorm, so there are no statistics
    of a batch to be adapted.

    ``direction=adaent`` is that of the conference version, KL(τ_e ‖ τ̂), whose gradient grows like 1/τ̂ when
    a class vanishes. ``size=released`` divides each pixel's probabilities by their largest before the mean,
    as the released code does, and is no mean of probabilities.

    Use it where the share of each image is known, with a small learning rate and few steps: on drawn walls of
    another look that raised Dice by 0.03. One share for all images did harm there, and on drawn vessels, part
    of whose contrast was turned round, nothing helped.
    """

    slug = "sfda"
    formula = "mean of -Σ_k ν_k p log p over the pixels + λ KL(τ̂ ‖ τ_e), τ̂ the mean of p"
    paper = Paper(
        "Source-Free Domain Adaptation for Image Segmentation",
        "Bateson, Dolz, Kervadec, Lombaert, Ben Ayed",
        2022,
    )
    flags = ("label-free",)
    example = "lossworks train jobs/specs/adapt.yaml start=RUN loss={slug}"

    prior: tuple[float, ...] | None = numbers(
        None,
        "τ_e: expected share of each class; unset, each image's own, or equal ones where it has none",
        ge=0,
        le=1,
        optional=True,
    )
    prior_weight: float = number(1.0, "λ: weight of the shares", ge=0, search=(0.1, 10), log=True)
    class_weights: tuple[float, ...] | None = numbers(
        None, "ν: weight of each class in the entropy; unset, 1 each", ge=0, optional=True
    )
    direction: str = choice(
        "adami", "of the divergence: KL(τ̂ ‖ τ_e), or KL(τ_e ‖ τ̂)", ("adami", "adaent"), search=True
    )
    size: str = choice("mean", "what τ̂ is: the mean of p, or as in the released code", ("mean", "released"))

    def images(self, maps: Maps) -> Tensor:
        """See :meth:`MapLoss.images`."""
        log_p = maps.log_probabilities
        entropy = -(log_p.exp() * log_p * self._per_class("class_weights", log_p)).sum(1)
        return pixel_means(entropy, maps.valid) + self.prior_weight * self._divergence(maps)

    def given(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`MapLoss.given`; with the expected shares of each image, where the batch holds them."""
        return {**super().given(batch), **{name: batch[name] for name in (_PRIORS,) if name in batch}}

    def _divergence(self, maps: Maps) -> Tensor:
        """Return the divergence of the shares, (B,)."""
        own = log_shares(self._log_sizes(maps), maps.valid)
        own = own - own.logsumexp(1, keepdim=True)
        expected = clamped(self._expected(maps)).log()
        p, q = (own, expected) if self.direction == "adami" else (expected, own)
        return (p.exp() * (p - q)).sum(1)

    def _log_sizes(self, maps: Maps) -> Tensor:
        """Return log p, or, as released, the logarithm of p over its largest, (B, K, H, W)."""
        log_p = maps.log_probabilities
        return log_p if self.size == "mean" else log_p - log_p.amax(1, keepdim=True)

    def _expected(self, maps: Maps) -> Tensor:
        """Return τ_e of each image, (B, K)."""
        images, classes = maps.logits.shape[:2]
        if self.prior is not None:
            return self._per_class("prior", maps.logits).flatten(1).expand(images, classes)
        given = maps.further.get(_PRIORS)
        if given is None:
            return maps.logits.new_full((images, classes), 1 / classes)
        if given.shape != (images, classes):
            raise UserError(f"{self.slug}: priors {tuple(given.shape)} must be {(images, classes)}")
        return given.to(maps.logits)

    def _per_class(self, name: str, like: Tensor) -> Tensor:
        """Return a hyperparameter of each class, (1, K, 1, 1); 1 each where it is unset."""
        values = getattr(self, name)
        if values is None:
            return like.new_ones(1, like.shape[1], 1, 1)
        if len(values) != like.shape[1]:
            raise UserError(
                f"{self.slug}: {name}={list(values)} must be {like.shape[1]} numbers, one a class"
            )
        return like.new_tensor(values).reshape(1, -1, 1, 1)
