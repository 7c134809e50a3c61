"""Models that read patches of spectra."""

from lossworks.models.audio.mask_net import MaskNet, build_mask_net

__all__ = ["MaskNet", "build_mask_net"]
