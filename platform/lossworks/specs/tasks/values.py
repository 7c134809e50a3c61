"""The parts of specs that say which examples with real targets, or with sets of labels, are read."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from lossworks.specs.base import Spec

VALUE_SOURCES = ("diabetes", "friedman:N", "linear:N", "chain:N", "csv:PATH", "parquet:PATH", "npz:PATH")
FROM_PATH = ("csv", "parquet", "npz")
LABEL_SET_SOURCES = ("topics:N", "csv:PATH", "parquet:PATH", "npz:PATH")


def known_source(value: str, forms: tuple[str, ...]) -> str:
    """Return a source of one of the forms; of ``kind:N`` there must be at least 20 examples.

    Raises:
        ValueError: Naming the forms.
    """
    kind, colon, name = value.partition(":")
    for form in forms:
        own, _, what = form.partition(":")
        counted = what == "N" and name.isdigit() and 20 <= int(name) <= 10**8
        if own == kind and ((not what and not colon) or counted or (what == "PATH" and name)):
            return value
    raise ValueError(f"must be one of {', '.join(forms)}, with N at least 20")


class TableSpec(Spec):
    """How columns of a table are read."""

    columns: dict[str, Literal["number", "yes-no", "date", "category", "drop"]] = Field(
        default_factory=dict,
        description="what columns of a table hold, where their cells don't tell it: number, yes-no, date, "
        "category (a feature each), or drop to leave one out; `lossworks data SOURCE` shows what is told",
    )


class ValuesSpec(TableSpec):
    """Examples with a real target each, how they are split, and what is done to the training targets."""

    source: str = Field(
        "diabetes",
        description="diabetes, friedman:N (N points of Friedman's first function with noise), linear:N (N "
        "points of a linear function of 100 features, with noise as large as the signal), chain:N (N "
        "transitions of a Markov chain, whose states' values are learnt from rewards), csv:PATH or "
        "parquet:PATH (a table with a column of targets) or npz:PATH (arrays x and y)",
    )
    label: str = Field("target", min_length=1, description="column with the target, of a table")
    held_out_fraction: float = Field(
        0.25, gt=0.0, lt=1.0, description="share of the examples kept for evaluation"
    )
    standardise: bool = Field(
        True, description="subtract the mean and divide by the deviation of every feature over training data"
    )
    standardise_targets: bool = Field(
        True,
        description="the same for the targets that are trained on; yardsticks are in their own unit. Not "
        "done for chain:N",
    )
    outliers: float = Field(
        0.0, ge=0.0, le=1.0, description="share of training targets that are put ten deviations away"
    )
    discount: float = Field(0.9, ge=0.0, lt=1.0, description="of chain:N: γ, by which the next state counts")
    bag_size: int = Field(
        1, ge=1, le=65536, description="training examples are dealt into bags of so many, which stay together"
    )

    @field_validator("source")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return known_source(value, VALUE_SOURCES)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.of_chain and self.bag_size > 1:
            raise ValueError(f"bag_size={self.bag_size}: transitions of {self.source} come in no bags")
        return self

    @property
    def from_path(self) -> bool:
        """Whether the examples are somebody's own, which may change."""
        return self.source.partition(":")[0] in FROM_PATH

    @property
    def of_chain(self) -> bool:
        """Whether targets are rewards, and the next state is part of an example."""
        return self.source.startswith("chain:")


class LabelSetsSpec(TableSpec):
    """Examples with a set of labels each, and how they are split."""

    source: str = Field(
        "topics:2000",
        description="topics:N (N points, each with the five labels that a random map ranks first), csv:PATH "
        "or parquet:PATH (a table with a column of labels, joined by `separator`) or npz:PATH (arrays x, "
        "and y as labels (N, P) padded with -1, or as zeros and ones (N, L))",
    )
    label: str = Field("labels", min_length=1, description="column with the labels, of a table")
    separator: str = Field("|", min_length=1, description="between the labels of a table's row")
    labels: int = Field(200, ge=10, le=10**7, description="of topics:N: how many labels there are, L")
    held_out_fraction: float = Field(
        0.25, gt=0.0, lt=1.0, description="share of the examples kept for evaluation"
    )
    standardise: bool = Field(
        True, description="subtract the mean and divide by the deviation of every feature over training data"
    )

    @field_validator("source")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return known_source(value, LABEL_SET_SOURCES)

    @property
    def from_path(self) -> bool:
        """Whether the examples are somebody's own, which may change."""
        return self.source.partition(":")[0] in FROM_PATH
