"""The parts of specs that say which labelled examples are read, and which small model reads them."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from lossworks.specs.base import Spec
from lossworks.specs.tasks.values import TableSpec

BUILT_IN = ("digits", "breast-cancer", "wine", "mnist1d")
FROM_PATH = ("csv", "parquet", "npz", "imagefolder")
_FORMS = ", ".join([*BUILT_IN, "blobs:N", *(f"{kind}:PATH" for kind in FROM_PATH)]) + " or hf:NAME"


class ExamplesSpec(TableSpec):
    """Labelled examples, how they are split, and what is done to the training labels."""

    source: str = Field(
        "digits",
        description=f"{', '.join(BUILT_IN)}, blobs:N (N points around 10 centres; a million and more lie on "
        "disk), csv:PATH or parquet:PATH (a table with a column of classes), npz:PATH (arrays x and y), "
        "imagefolder:PATH (a folder a class) or hf:NAME (the datasets library; needs a network)",
    )
    label: str = Field("label", min_length=1, description="column with the class, of a table or hf data set")
    owner: str | None = Field(
        None,
        min_length=1,
        description="column (of npz files: array) with whom an example belongs to, such as a site or "
        "writer, of a table, npz file or hf data set; no feature",
    )
    input: str = Field("image", min_length=1, description="column of an hf data set with the input")
    follow_links: bool = Field(
        False, description="whether an imagefolder's links to files outside of it are read"
    )
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
    classes: tuple[str | int, ...] | None = Field(
        None, min_length=2, description="names of the classes that are kept, such as [3, 8]; all if unset"
    )
    bag_size: int = Field(
        1, ge=1, le=65536, description="training examples are dealt into bags of so many, which stay together"
    )

    @property
    def from_path(self) -> bool:
        """Whether the examples are somebody's own, which may change."""
        return self.source.partition(":")[0] in (*FROM_PATH, "hf")

    @property
    def may_be_binary(self) -> bool:
        """Whether there can be two classes; of sources that must be read first, it is not known here."""
        if self.classes is not None:
            return len(self.classes) == 2
        return self.source == "breast-cancer" or (":" in self.source and not self.source.startswith("blobs"))

    @model_validator(mode="after")
    def _has_owners(self) -> Self:
        if self.owner is not None and self.source.partition(":")[0] not in ("csv", "parquet", "npz", "hf"):
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
    layers: int = Field(
        2,
        ge=0,
        le=64,
        description="hidden layers, 0 for a linear mlp; convolutions, or residual blocks a stage",
    )
    width: int = Field(128, ge=2, le=16384, description="features of a layer; channels of the first stage")
    groups: int = Field(8, ge=1, le=64, description="groups of GroupNorm; must divide width")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of features set to zero before the head")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.layers and self.kind != "mlp":
            raise ValueError(f"layers=0 is a linear model, kind=mlp; kind={self.kind} needs at least 1")
        if self.kind == "resnet" and self.width % self.groups:
            raise ValueError(f"width={self.width} must be a multiple of groups={self.groups}")
        return self
