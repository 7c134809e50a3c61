"""What tasks share whose data are examples in memory and whose model is a small one with a head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from torch import Tensor

from lossworks.data import BagOrder, Order
from lossworks.data.example_sources import read_arrays
from lossworks.data.examples import Examples
from lossworks.data.tables import Features, read_cells
from lossworks.errors import UserError
from lossworks.models import Classifier, HeadedModel, build_classifier
from lossworks.models.folders import CONFIG, read_config
from lossworks.models.operations import count_step_flops
from lossworks.specs import ClassifierModelSpec, RunSpec
from lossworks.tasks.interface import Task


def require_small(spec: RunSpec) -> None:
    """Refuse what is for large models and heads, and an optimiser that would find nothing to move.

    Raises:
        ValueError: Naming the field.
    """
    if spec.activation_checkpointing:
        raise ValueError("activation_checkpointing=true is for language models")
    require_whole_head(spec)
    model = getattr(spec, "model", None)
    has_matrices = isinstance(model, ClassifierModelSpec) and model.kind == "mlp" and model.layers > 0
    if spec.optimizer.kind == "muon" and not has_matrices:
        raise ValueError(
            "optimizer.kind=muon moves the matrices between inputs and head, which of these models only "
            "model.kind=mlp has, with model.layers at least 1; use optimizer.kind=adamw"
        )


def require_whole_head(spec: RunSpec) -> None:
    """Refuse a head that is split over the workers, which pays only for a large one.

    Raises:
        ValueError: Naming the field.
    """
    if spec.sharding.vocab_parallel:
        raise ValueError("sharding.vocab_parallel=true is for the large heads of language models")


def require_whole_bags(spec: RunSpec, bag_size: int) -> None:
    """Refuse batches that would part bags.

    Raises:
        ValueError: Naming the field.
    """
    for name in ("batch_size", "micro_batch_size"):
        size = getattr(spec, name)
        if isinstance(size, int) and size % bag_size:
            raise ValueError(f"{name}={size} must be a multiple of data.bag_size={bag_size}: bags stay whole")


def read_inputs(folder: Path, file: Path) -> tuple[np.ndarray, dict[str, list[str]], list[str]]:
    """Return a file's inputs as an exported model takes them, its own columns, and what to know of it.

    Args:
        folder: Of the model.
        file: A table, if the model was trained on one, or an npz file with the array ``x``.

    Raises:
        UserError: The file can't be read, or lacks something.
    """
    if not file.is_file():
        raise UserError(f"{file}: {'is no file' if file.exists() else 'no such file'}")
    if file.suffix.lower() == ".npz":
        return read_arrays(file, ["x"])["x"], {}, []
    columns = read_config(folder / CONFIG).get("columns")
    if not columns:
        raise UserError(f"{file}: the model in {folder} was trained on arrays; give an npz file with x")
    cells, features = read_cells(file), Features.of_plain(columns)
    return features.encode(cells), dict(cells.columns), features.surprises(cells)


class ExamplesTask(Task):
    """A task of examples in memory.

    A subclass sets these attributes, ``train`` and ``held_out`` when it is made.

    Attributes:
        shape: Of one example.
        outputs: How many the head has.
    """

    unit: ClassVar[str] = "examples"

    shape: tuple[int, ...]
    outputs: int

    @property
    def bag_size(self) -> int:
        """Examples that stay together in every batch."""
        return 1

    @classmethod
    def obstacle(cls, spec: RunSpec) -> str | None:
        """See :meth:`Task.obstacle`."""
        dropout = _model(spec).dropout
        return f"model.dropout={dropout} draws random numbers" if dropout > 0 else None

    def order(self) -> Order:
        """Return an order of whole bags, or of examples where there are no bags."""
        spec = self.spec_of_run
        return BagOrder(len(self.train), self.bag_size, spec.batch_size, spec.seed)

    def all_targets(self) -> tuple[Tensor, Tensor]:
        """Return the targets of all training examples, and of all held-out ones."""
        train = self.train.batch(np.arange(len(self.train)))
        held_out = self.held_out.batch(np.arange(len(self.held_out)))
        return train["targets"], held_out["targets"]

    @property
    def data_bytes(self) -> int:
        """See :attr:`Task.data_bytes`."""
        return cast("Examples", self.train).nbytes + cast("Examples", self.held_out).nbytes

    def build_model(self, model: Mapping[str, Any] | None = None) -> Classifier:
        """See :meth:`Task.build_model`."""
        spec = _model(self.spec_of_run)
        if model is not None:
            spec = ClassifierModelSpec.parse(model, source="model")
        return build_classifier(spec, shape=self.shape, classes=self.outputs, seed=self.spec_of_run.seed)

    def flops_per_unit(self, model: HeadedModel) -> float:
        """Return the operations an example, counted on two of them."""
        inputs = self.train.batch(np.arange(2) % len(self.train))["inputs"]
        return count_step_flops(model, inputs) / len(inputs)


def _model(spec: RunSpec) -> ClassifierModelSpec:
    return cast("ClassifierModelSpec", spec.model)  # type: ignore[attr-defined]
