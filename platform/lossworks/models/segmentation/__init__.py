"""Models of dense prediction: a class for each pixel of an image, and how large images are read."""

from lossworks.models.segmentation.building import build_segmenter
from lossworks.models.segmentation.predict_refine import PredictRefine
from lossworks.models.segmentation.segmenter import Segmenter
from lossworks.models.segmentation.trained_segmenter import TrainedSegmenter, load_segmenter, save_segmenter
from lossworks.models.segmentation.unet import UNet

__all__ = [
    "PredictRefine",
    "Segmenter",
    "TrainedSegmenter",
    "UNet",
    "build_segmenter",
    "load_segmenter",
    "save_segmenter",
]
