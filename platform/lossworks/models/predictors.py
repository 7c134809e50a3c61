"""Trained models of examples as folders, for regressions and multi-label models.

A folder holds ``config.json`` (format version, model spec, shape of an example, how outputs are read, scale
of the inputs, provenance) and ``model.safetensors``. Classifiers have a format of their own, in
:mod:`lossworks.models.trained_classifier`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossworks.catalogue.registry import create
from lossworks.data.standardise import Standardisation, to_float32
from lossworks.errors import UserError
from lossworks.models.classifiers import Classifier, build_classifier
from lossworks.models.folders import (
    CONFIG,
    PREDICTOR_FORMAT,
    fill_model,
    read_config,
    require_version,
    write_model,
)
from lossworks.specs import ClassifierModelSpec

FORMAT_VERSION = 1
_AT_ONCE = 1024  # examples


@dataclass(frozen=True, eq=False)
class Predictor:
    """A model of examples ready to be asked.

    Attributes:
        model: On the CPU, in eval mode.
        shape: Of one example.
        reading: ``values``: outputs are decoded to a number each; ``labels``: they are scores of labels.
        loss: What it was trained with, which reads the outputs.
        standardisation: What the model expects to be done to its inputs, if anything.
        target: Mean and deviation of the targets that values are brought back to.
        names: Of the labels.
    """

    model: Classifier
    shape: tuple[int, ...]
    reading: str
    loss: Any
    standardisation: Standardisation | None
    target: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()

    @torch.no_grad()
    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Return the values (N,), or the scores of labels (N, L), float32, for examples (N, …) as they come.

        Raises:
            UserError: They have another shape, or numbers that float32 can't hold.
        """
        if tuple(inputs.shape[1:]) != self.shape:
            raise UserError(f"examples of shape {inputs.shape[1:]}: the model was trained on {self.shape}")
        scaled = inputs if self.standardisation is None else self.standardisation(inputs)
        chunks = torch.from_numpy(to_float32(scaled)).split(_AT_ONCE)
        found: np.ndarray = torch.cat([self._read(chunk) for chunk in chunks]).numpy()
        return found

    def _read(self, inputs: Tensor) -> Tensor:
        outputs = self.model.outputs(inputs)
        if self.reading == "labels":
            head = self.model.head()
            found: Tensor = self.loss.scores(outputs.hidden, head.weight, head.bias)
            return found
        decode = getattr(self.loss, "decode", None)
        values = outputs.logits[..., 0] if decode is None else decode(outputs.logits)
        mean, deviation = self.target
        return values * deviation + mean


def save_predictor(
    folder: str | Path,
    *,
    reading: str,
    spec: ClassifierModelSpec,
    state: Mapping[str, Tensor],
    shape: tuple[int, ...],
    outputs: int,
    standardisation: Standardisation | None,
    columns: Sequence[Mapping[str, Any]] | None = None,
    further: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write a trained model to ``folder``, which appears complete or not at all.

    Args:
        folder: Absent or empty.
        reading: See :class:`Predictor`.
        spec: What the model was built from.
        state: The model's unsharded ``state_dict()``.
        shape: Of one example.
        outputs: Of the head.
        standardisation: What was done to the training inputs, if anything.
        columns: How the columns of a table become an example, as plain data; None if it came from no table.
        further: ``loss`` with its hyperparameters, and ``target`` or ``names``.
        provenance: Where the model comes from; anything JSON can hold.

    Raises:
        UserError: ``folder`` isn't empty, ``state`` doesn't fit ``spec``, or ``provenance`` isn't JSON.
    """
    config = {
        "format": PREDICTOR_FORMAT,
        "format_version": FORMAT_VERSION,
        "reading": reading,
        "model": spec.model_dump(mode="json"),
        "shape": shape,
        "outputs": outputs,
        "standardisation": None if standardisation is None else standardisation.plain(),
        "columns": columns,
        **further,
        "provenance": dict(provenance),
    }
    write_model(Path(folder), config, _empty(spec, shape, outputs), state)


def load_predictor(folder: str | Path) -> Predictor:
    """Return the model that ``save_predictor`` wrote.

    Raises:
        UserError: A file is missing or damaged, of an unknown format, or its tensors don't fit.
    """
    path = Path(folder) / CONFIG
    config = read_config(path)
    if config.get("format") != PREDICTOR_FORMAT:
        raise UserError(f"{path}: is no exported regression or multi-label model")
    require_version(config, path, FORMAT_VERSION)
    spec = ClassifierModelSpec.parse(config.get("model") or {}, source=str(path))
    try:
        shape, outputs = tuple(int(size) for size in config["shape"]), int(config["outputs"])
        scale = (
            None if config["standardisation"] is None else Standardisation.of_plain(config["standardisation"])
        )
        loss = dict(config["loss"])
        slug = str(loss.pop("name"))
        target = config.get("target", {"mean": 0.0, "deviation": 1.0})
        scaled = (float(target["mean"]), float(target["deviation"]))
        reading, names = str(config["reading"]), tuple(map(str, config.get("names", ())))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: lacks shape, outputs, loss or scales, or they are damaged") from None
    model = _empty(spec, shape, outputs)
    fill_model(model, Path(folder))
    made = create(slug, **loss)
    return Predictor(model.eval(), shape, reading, made, scale, scaled, names)


def _empty(spec: ClassifierModelSpec, shape: tuple[int, ...], outputs: int) -> Classifier:
    """Return the model with parameters on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return build_classifier(spec, shape=shape, classes=outputs, seed=0)
