"""The spec of training a classifier, and which spec a file holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lossworks.errors import UserError
from lossworks.specs.base import Spec, apply_overrides
from lossworks.specs.train import RunSpec, TrainSpec

BUILT_IN = ("digits", "breast-cancer", "wine", "mnist1d")
FROM_PATH = ("csv", "npz", "imagefolder")
_FORMS = ", ".join([*BUILT_IN, "blobs:N", *(f"{kind}:PATH" for kind in FROM_PATH)]) + " or hf:NAME"


class ExamplesSpec(Spec):
    """Labelled examples, how they are split, and what is done to the training labels."""

    source: str = Field(
        "digits",
        description=f"{', '.join(BUILT_IN)}, blobs:N (N points around 10 centres), csv:PATH (numeric "
        "columns and a label), npz:PATH (arrays x and y), imagefolder:PATH (a folder a class) or hf:NAME "
        "(the datasets library; needs a network)",
    )
    label: str = Field(
        "label", min_length=1, description="column with the class, of a csv file or hf data set"
    )
    owner: str | None = Field(
        None,
        min_length=1,
        description="column (of npz files: array) with whom an example belongs to, such as a site or "
        "writer, of a csv or npz file or hf data set; no feature",
    )
    input: str = Field("image", min_length=1, description="column of an hf data set with the input")
    image_size: int = Field(32, ge=4, le=1024, description="pixels a side that images are brought to")
    held_out_fraction: float = Field(
        0.25, gt=0.0, lt=1.0, description="share of the examples of each class kept for evaluation"
    )
    standardise: bool = Field(
        True, description="subtract the mean and divide by the deviation of every feature over training data"
    )
    label_noise: float = Field(
        0.0, ge=0.0, le=1.0, description="share of training labels drawn anew from all classes alike"
    )
    imbalance: float = Field(
        1.0, ge=1.0, le=10000.0, description="examples of the first class over those of the last, in training"
    )
    bag_size: int = Field(
        1, ge=1, le=65536, description="training examples are dealt into bags of so many, which stay together"
    )

    @model_validator(mode="after")
    def _has_owners(self) -> Self:
        if self.owner is not None and self.source.partition(":")[0] not in ("csv", "npz", "hf"):
            raise ValueError(f"owner={self.owner}: source={self.source} doesn't say whose an example is")
        return self

    @field_validator("source")
    @classmethod
    def _is_known(cls, value: str) -> str:
        kind, colon, name = value.partition(":")
        blobs = kind == "blobs" and name.isdigit() and 20 <= int(name) <= 10**8
        if value in BUILT_IN or blobs or (colon and name and kind in (*FROM_PATH, "hf")):
            return value
        raise ValueError(f"must be one of {_FORMS}, with at least 20 blobs")


class ClassifierModelSpec(Spec):
    """A small classifier: features and a linear head on them."""

    kind: Literal["mlp", "cnn", "resnet"] = Field(
        "mlp", description="mlp for vectors; cnn and resnet (GroupNorm) for signals and images"
    )
    layers: int = Field(2, ge=1, le=64, description="hidden layers, convolutions, or residual blocks a stage")
    width: int = Field(128, ge=2, le=16384, description="features of a layer; channels of the first stage")
    groups: int = Field(8, ge=1, le=64, description="groups of GroupNorm; must divide width")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of features set to zero before the head")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "resnet" and self.width % self.groups:
            raise ValueError(f"width={self.width} must be a multiple of groups={self.groups}")
        return self


class ClassifierSpec(RunSpec):
    """Training of a classifier."""

    task: Literal["classification"] = Field("classification", description="what is trained")
    data: ExamplesSpec = ExamplesSpec()
    model: ClassifierModelSpec = ClassifierModelSpec()
    neural_collapse: bool = Field(
        False, description="with each evaluation, measure NC1 to NC4 on the training examples, and draw them"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("batch_size", "micro_batch_size"):
            size = getattr(self, name)
            if size is not None and size % self.data.bag_size:
                raise ValueError(
                    f"{name}={size} must be a multiple of data.bag_size={self.data.bag_size}: bags stay whole"
                )
        if self.activation_checkpointing:
            raise ValueError("activation_checkpointing=true is for language models")
        if self.sharding.vocab_parallel:
            raise ValueError("sharding.vocab_parallel=true is for the large heads of language models")
        self.loss.require(lambda entry: entry.kind in ("row", "logits"), "a classifier")
        return self


AnyTrainSpec = TrainSpec | ClassifierSpec
_CLASSES: dict[str, type[TrainSpec] | type[ClassifierSpec]] = {
    "language-model": TrainSpec,
    "classification": ClassifierSpec,
}


def parse_train_spec(values: Mapping[str, Any], *, source: str = "spec") -> AnyTrainSpec:
    """Return the spec that ``values`` describe; their ``task`` says which class it is.

    Raises:
        UserError: A value is wrong.
    """
    return _class_of(values, source).parse(values, source=source)


def read_train_spec(path: str | Path, overrides: Sequence[str] = ()) -> AnyTrainSpec:
    """Return the spec in the YAML file ``path`` with ``key.path=value`` overrides applied.

    Raises:
        UserError: The file is missing, is no YAML mapping, or holds a wrong value.
    """
    values = TrainSpec.read_values(path)
    # A bare word, so that it needs no YAML; whatever else stands there is refused as it was written.
    tasks = [text.partition("=")[2].strip() for text in overrides if text.startswith("task=")]
    asked = {"task": tasks[-1]} if tasks else {}
    kind = _class_of({**values, **asked}, str(path))
    return kind.parse(apply_overrides(kind, values, overrides), source=str(path))


def _class_of(values: Mapping[str, Any], source: str) -> type[TrainSpec] | type[ClassifierSpec]:
    TrainSpec.require_own(values, source)
    task = values.get("task", "language-model")
    if not isinstance(task, str) or task not in _CLASSES:
        raise UserError(f"{source}: task={task!r} must be one of {', '.join(_CLASSES)}")
    return _CLASSES[task]
