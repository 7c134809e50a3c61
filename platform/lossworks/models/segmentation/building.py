"""From a spec to a model of dense prediction."""

from collections.abc import Callable

import torch

from lossworks.models.segmentation.incremental import IncrementalUNet
from lossworks.models.segmentation.predict_refine import PredictRefine
from lossworks.models.segmentation.segmenter import Segmenter
from lossworks.models.segmentation.unet import UNet
from lossworks.specs.tasks.segmenter import SegmenterSpec

_KINDS: dict[str, Callable[[SegmenterSpec, int, int], Segmenter]] = {
    "unet": UNet,
    "predict-refine": PredictRefine,
    "incremental-unet": IncrementalUNet,
}


def build_segmenter(spec: SegmenterSpec, *, channels: int, classes: int, seed: int) -> Segmenter:
    """Return the segmenter that ``spec`` describes, in float32 on the CPU and in training mode.

    The same seed gives bit-identical parameters, and the global random state is left as it was.

    Args:
        spec: What to build.
        channels: C of the images.
        classes: K.
        seed: Seed of the initial parameters.

    Raises:
        UserError: The spec names other classes than there are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _KINDS[spec.kind](spec, channels, classes)
