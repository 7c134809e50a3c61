"""Trained classifiers as folders, with all that lies between an example as it comes and probabilities.

A folder holds ``config.json`` (format version, model spec, shape of an example, names of the classes, the
training data's mean and deviation, provenance) and ``model.safetensors``.
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
from lossworks.models.classifiers import Classifier, build_classifier
from lossworks.models.folders import (
    CLASSIFIER_FORMAT,
    CONFIG,
    fill_model,
    read_config,
    require_version,
    write_model,
)
from lossworks.specs import ClassifierModelSpec

FORMAT_VERSION = 1

_AT_ONCE = 1024  # examples


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A classifier ready to be asked.

    Attributes:
        model: On the CPU, in eval mode.
        shape: Of one example.
        names: Of the K classes, in the order of their numbers.
        standardisation: What the model expects to be done to its inputs, if anything.
    """

    model: Classifier
    shape: tuple[int, ...]
    names: tuple[str, ...]
    standardisation: Standardisation | None

    @torch.no_grad()
    def probabilities(self, inputs: np.ndarray) -> np.ndarray:
        """Return the probability of each class, (N, K) float32, for examples (N, …) as they come.

        Raises:
            UserError: They have another shape, or numbers that float32 can't hold.
        """
        if tuple(inputs.shape[1:]) != self.shape:
            raise UserError(f"examples of shape {inputs.shape[1:]}: the model was trained on {self.shape}")
        scaled = inputs if self.standardisation is None else self.standardisation(inputs)
        chunks = torch.from_numpy(to_float32(scaled)).split(_AT_ONCE)
        return torch.cat([self.model.logits(chunk).softmax(-1) for chunk in chunks]).numpy()


def save_classifier(
    folder: str | Path,
    *,
    spec: ClassifierModelSpec,
    state: Mapping[str, Tensor],
    shape: tuple[int, ...],
    names: tuple[str, ...],
    standardisation: Standardisation | None,
    columns: Sequence[Mapping[str, Any]] | None = None,
    provenance: Mapping[str, Any],
) -> None:
    """Write a trained classifier to ``folder``, which appears complete or not at all.

    Args:
        folder: Absent or empty.
        spec: What the model was built from.
        state: The model's unsharded ``state_dict()``.
        shape: Of one example.
        names: Of the classes.
        standardisation: What was done to the training inputs, if anything.
        columns: How the columns of a table become an example, as plain data; None if it came from no table.
        provenance: Where the model comes from; anything JSON can hold.

    Raises:
        UserError: ``folder`` isn't empty, ``state`` doesn't fit ``spec``, or ``provenance`` isn't JSON.
    """
    scale = None if standardisation is None else standardisation.plain()
    config = {
        "format": CLASSIFIER_FORMAT,
        "format_version": FORMAT_VERSION,
        "model": spec.model_dump(mode="json"),
        "shape": shape,
        "classes": names,
        "standardisation": scale,
        "columns": columns,
        "provenance": dict(provenance),
    }
    write_model(Path(folder), config, _empty(spec, shape, names), state)


def load_classifier(folder: str | Path) -> TrainedClassifier:
    """Return the classifier that ``save_classifier`` wrote.

    Raises:
        UserError: A file is missing or damaged, of an unknown format, or its tensors don't fit.
    """
    path = Path(folder) / CONFIG
    config = read_config(path)
    if config.get("format") != CLASSIFIER_FORMAT:
        raise UserError(f"{path}: isn't a classifier of Lossworks")
    require_version(config, path, FORMAT_VERSION)
    spec = ClassifierModelSpec.parse(config.get("model") or {}, source=str(path))
    shape, names, scale = _parts(config, path)
    model = _empty(spec, shape, names)
    fill_model(model, Path(folder))
    return TrainedClassifier(model.eval(), shape, names, scale)


def _parts(
    config: Mapping[str, Any], path: Path
) -> tuple[tuple[int, ...], tuple[str, ...], Standardisation | None]:
    try:
        shape = tuple(int(size) for size in config["shape"])
        names = tuple(str(name) for name in config["classes"])
        scale = config["standardisation"] and Standardisation.of_plain(config["standardisation"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: lacks shape, classes or standardisation, or they are damaged") from None
    return shape, names, scale


def _empty(spec: ClassifierModelSpec, shape: tuple[int, ...], names: tuple[str, ...]) -> Classifier:
    """Return the model with parameters on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return build_classifier(spec, shape=shape, classes=len(names), seed=0)
