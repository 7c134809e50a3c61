"""Trained models of dense prediction as folders: written, and read again without the run.

A folder holds ``config.json`` (format version, model spec, channels, names of the classes, scale of the
inputs, provenance) and ``model.safetensors``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossworks.data.standardise import Standardisation, to_float32
from lossworks.errors import UserError
from lossworks.models.folders import (
    CONFIG,
    SEGMENTER_FORMAT,
    fill_model,
    read_config,
    require_version,
    write_model,
)
from lossworks.models.segmentation.building import build_segmenter
from lossworks.models.segmentation.segmenter import Segmenter
from lossworks.specs.tasks.segmenter import SegmenterSpec

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class TrainedSegmenter:
    """A model of dense prediction ready to be asked.

    Attributes:
        model: On the CPU, in eval mode.
        channels: C that an image has.
        names: Of the classes, K.
        standardisation: What the model expects to be done to its inputs, if anything.
    """

    model: Segmenter
    channels: int
    names: tuple[str, ...]
    standardisation: Standardisation | None

    def masks(self, images: np.ndarray) -> np.ndarray:
        """Return the class of each pixel, (N, H, W) int64, for images (N, C, H, W) as they come.

        Raises:
            UserError: They have other channels, or numbers that float32 can't hold.
        """
        found = [self.model.classes_of(image) for image in self._scaled(images).split(1)]
        return torch.cat(found).numpy()

    @torch.no_grad()
    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return the probabilities of the classes, (N, H, W, K) float32; as for :meth:`masks`."""
        found = [self.model.logits(image).softmax(-1) for image in self._scaled(images).split(1)]
        return torch.cat(found).numpy()

    def _scaled(self, images: np.ndarray) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise UserError(
                f"images of shape {images.shape}: the model reads (N, {self.channels}, height, width)"
            )
        scaled = images if self.standardisation is None else self.standardisation(images)
        return torch.from_numpy(to_float32(scaled))


def save_segmenter(
    folder: str | Path,
    *,
    spec: SegmenterSpec,
    state: Mapping[str, Tensor],
    channels: int,
    names: Sequence[str],
    standardisation: Standardisation | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write a trained model to ``folder``, which appears complete or not at all.

    Args:
        folder: Absent or empty.
        spec: What the model was built from.
        state: The model's unsharded ``state_dict()``.
        channels: C of the images.
        names: Of the classes.
        standardisation: What was done to the training images, if anything.
        provenance: Where the model comes from; anything JSON can hold.

    Raises:
        UserError: ``folder`` isn't empty, ``state`` doesn't fit ``spec``, or ``provenance`` isn't JSON.
    """
    config = {
        "format": SEGMENTER_FORMAT,
        "format_version": FORMAT_VERSION,
        "model": spec.model_dump(mode="json"),
        "channels": channels,
        "classes": list(names),
        "standardisation": None if standardisation is None else standardisation.plain(),
        "provenance": dict(provenance),
    }
    write_model(Path(folder), config, _empty(spec, channels, len(names)), state)


def load_segmenter(folder: str | Path) -> TrainedSegmenter:
    """Return the model that ``save_segmenter`` wrote.

    Raises:
        UserError: A file is missing or damaged, of an unknown format, or its tensors don't fit.
    """
    path = Path(folder) / CONFIG
    config = read_config(path)
    if config.get("format") != SEGMENTER_FORMAT:
        raise UserError(f"{path}: is no exported model of dense prediction")
    require_version(config, path, FORMAT_VERSION)
    spec = SegmenterSpec.parse(config.get("model") or {}, source=str(path))
    try:
        channels, names = int(config["channels"]), tuple(map(str, config["classes"]))
        scale = config["standardisation"]
        standardisation = None if scale is None else Standardisation.of_plain(scale)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: lacks channels, classes or scale, or they are damaged") from None
    model = _empty(spec, channels, len(names))
    fill_model(model, Path(folder))
    return TrainedSegmenter(model.eval(), channels, names, standardisation)


def _empty(spec: SegmenterSpec, channels: int, classes: int) -> Segmenter:
    """Return the model with parameters on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return build_segmenter(spec, channels=channels, classes=classes, seed=0)
