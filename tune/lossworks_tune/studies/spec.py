"""The spec of a study: what is claimed, what is compared, and what is expected of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from lossworks.catalogue.registry import declaration
from lossworks.errors import require_one
from lossworks.specs import Spec, TrackingSpec
from lossworks.specs.base import Seed, Storage, apply_overrides
from lossworks.trainables import OWN_VALUES
from lossworks_tune.bases import read_base, require_yardstick
from lossworks_tune.studies.plan import StudyPlan, leaves, nested


class ExpectationSpec(Spec):
    """What is expected of two variants: ``{better: A, than: B, on: M}`` or ``{equal: A, to: B, on: M}``."""

    better: str | None = Field(None, description="variant that is expected to be the better one")
    than: str | None = Field(None, description="the variant that it is better than")
    equal: str | None = Field(None, description="variant that is expected to be as good as another")
    to: str | None = Field(None, description="that other variant")
    on: str = Field(description="yardstick by which they are compared")
    where: dict[str, Any] = Field(
        default_factory=dict,
        description="values of fields in over: the settings that count, averaged seed by seed; all if unset",
    )
    by: float = Field(
        0.0,
        ge=0.0,
        description="better by more than so much, in the yardstick's unit; equal up to so much",
    )

    @field_validator("where", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        return dict(leaves(value)) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name in ("better", "than", "equal", "to") if getattr(self, name) is not None]
        if given not in (["better", "than"], ["equal", "to"]):
            raise ValueError("write {better: VARIANT, than: VARIANT, …} or {equal: VARIANT, to: VARIANT, …}")
        if self.equal is not None and not self.by:
            raise ValueError(
                f"equal: {self.equal}, to: {self.to} needs `by`, the largest difference that counts as none"
            )
        return self

    @property
    def variants(self) -> tuple[str, str]:
        """The two variants."""
        return (self.better or self.equal or "", self.than or self.to or "")

    def __str__(self) -> str:
        one, other = self.variants
        kind = "better than" if self.better is not None else "equal to"
        by = "" if not self.by else f" by more than {self.by:g}" if self.better else f" up to {self.by:g}"
        where = ", ".join(f"{name}={value}" for name, value in self.where.items())
        return f"{one} {kind} {other} on {self.on}{by}" + (f" where {where}" if where else "")


class StudySpec(Spec):
    """Variants of a training, compared over seeds by what is expected of them."""

    command: ClassVar[str | None] = "study"
    inner: ClassVar[str | None] = "base"

    kind: Literal["study"] = Field("study", description="what the spec describes")
    name: str = Field("study", min_length=1, max_length=100, description="name of the run in MLflow")
    claim: str = Field("", max_length=1000, description="what is claimed, in a sentence")
    paper: str = Field("", max_length=1000, description="the paper that claims it")
    entries: tuple[str, ...] = Field((), description="entries of the catalogue that it is about, by slug")
    base: dict[str, Any] = Field(
        default_factory=dict,
        description="spec of the training that is varied, as `lossworks train` or `lossworks federate` takes "
        "it; in a file also the path of one, from the file's folder, or spec: PATH with what differs from it",
    )
    first: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="trainings that come before the variants, one a seed, by name: each with the fields that "
        "differ from the base, or all of them where task is one; all variants begin from the one named "
        "start, and first:NAME as a value stands for the run of NAME: {roles.teacher.of: first:NAME}",
    )
    compare: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="variants by name, each with the fields that differ from the base; the others are "
        "compared to the first; a list of slugs is short for losses",
    )
    over: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict,
        description="further fields with the values at which all variants are compared: "
        "{data.label_noise: [0, 0.6]}",
    )
    seeds: tuple[Seed, ...] = Field(
        (0, 1, 2, 3, 4), min_length=1, description="seeds, the same for all variants; 5 is short for 0 to 4"
    )
    yardsticks: tuple[str, ...] = Field(
        (), description="metrics that are reported; default: all of the task but the loss's own value"
    )
    expect: tuple[ExpectationSpec, ...] = Field((), description="what is expected of the variants")
    storage: Storage = Field(None, description="absolute folder of runs; default: runs/ in the home folder")
    tracking: TrackingSpec = TrackingSpec()

    @field_validator("compare", mode="before")
    @classmethod
    def _of_losses(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return {str(slug): {"loss": {"name": slug}} for slug in value}
        if isinstance(value, Mapping) and all(isinstance(fields, Mapping) for fields in value.values()):
            return {name: nested(fields) for name, fields in value.items()}
        return value

    @field_validator("first", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and all(isinstance(fields, Mapping) for fields in value.values()):
            return {name: nested(fields) for name, fields in value.items()}
        raise ValueError("write {start: {field: value, …}}: names of trainings, each with its fields")

    @field_validator("over", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        return dict(leaves(value)) if isinstance(value, Mapping) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if value < 1:
            raise ValueError("give how many, at least 1, or a list of seeds")
        return tuple(range(value))

    def make_plan(self) -> StudyPlan:
        """Return what is trained.

        Raises:
            UserError: The base is wrong.
        """
        return StudyPlan(self.base, self.compare, self.over, self.seeds, self.first)

    @property
    def digest(self) -> str:
        """Digest of what is trained: it changes with base, variants and so on as they are given."""
        names = {"base", "compare", "over", "seeds", *(["first"] if self.first else [])}
        values = self.model_dump(mode="json", include=names)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.compare) < 2:
            held = ", ".join(self.compare) or "no variants"
            raise ValueError(
                f"compare: holds {held}, and a comparison takes two or more; give {{NAME: {{field: value}}, "
                "…} or a list of losses"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: the same seed twice gives the same result twice")
        for slug in self.entries:
            declaration(slug)
        plan = self.make_plan()
        plan.check()
        self._require_yardsticks(plan)
        for expectation in self.expect:
            self._require_expectable(expectation, plan)
        return self

    def _require_yardsticks(self, plan: StudyPlan) -> None:
        for name in (*self.yardsticks, *(expectation.on for expectation in self.expect)):
            field = "yardsticks" if name in self.yardsticks else "expect.on"
            require_yardstick(name, plan.yardsticks, field)
            if name in OWN_VALUES and plan.varies_the_loss:
                raise ValueError(
                    f"{field}={name}: the value of the trained loss compares no losses or settings of one"
                )

    def _require_expectable(self, expectation: ExpectationSpec, plan: StudyPlan) -> None:
        for variant in expectation.variants:
            require_one(variant, plan.variants, "variant for expect")
        if len(set(expectation.variants)) == 1:
            raise ValueError(f"expect: {expectation.variants[0]} is compared to itself")
        if expectation.where and not self.over:
            raise ValueError("expect.where: needs fields in over, and there are none")
        for name, value in expectation.where.items():
            require_one(name, list(self.over), "field in over for expect.where")
            if value not in self.over[name]:
                known = ", ".join(map(str, self.over[name]))
                raise ValueError(f"expect.where.{name}={value}: is not compared at; over has {known}")

    @property
    def reported(self) -> tuple[str, ...]:
        """The yardsticks that are reported: those asked for, and those on which something is expected."""
        usual = (name for name in self.make_plan().yardsticks if name not in OWN_VALUES)
        expected = (expectation.on for expectation in self.expect)
        return tuple(dict.fromkeys((*(self.yardsticks or usual), *expected)))

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Return the study in a YAML file; paths in it are taken from its folder.

        Raises:
            UserError: The file is missing, is no YAML mapping, or holds a wrong value.
        """
        values = cls.read_values(path)
        values["base"] = read_base(values.get("base", {}), cls.file(path).parent)
        # Overrides reach into it, since it has been read.
        return cls.parse(apply_overrides(cls, values, overrides), source=str(path))

    @classmethod
    def around(cls, path: str, overrides: Sequence[str]) -> Self:
        """Return a study whose base is the training spec in a YAML file.

        Args:
            path: The file.
            overrides: ``key.path=value`` fields: of the study if it has the first key, else of the base.

        Raises:
            UserError: The file is missing, is no YAML mapping, or holds a wrong value.
        """
        own = [text.partition("=")[0].partition(".")[0] in cls.model_fields for text in overrides]
        fields = [text if of_study else f"base.{text}" for text, of_study in zip(overrides, own, strict=True)]
        values = {"kind": "study", "name": Path(path).stem, "base": read_base(path, Path())}
        return cls.parse(apply_overrides(cls, values, fields), source=path)
