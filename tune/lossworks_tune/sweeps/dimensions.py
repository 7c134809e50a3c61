"""What one field of a training is searched over, and what of a loss is."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from lossworks.catalogue.registry import declaration
from lossworks.errors import UserError
from lossworks.specs import Spec

Number = int | float


class DimensionSpec(Spec):
    """What one field is searched over: ``{log: [1e-4, 1e-2]}``; a list is short for ``{choice: […]}``."""

    shorthand: ClassVar[str | None] = "choice"

    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="values to try")
    uniform: tuple[Number, Number] | None = Field(None, description="least and largest number")
    log: tuple[Number, Number] | None = Field(None, description="the same, on a logarithmic scale")
    integer: tuple[int, int] | None = Field(None, description="least and largest integer")
    log_integer: tuple[int, int] | None = Field(None, description="the same, on a logarithmic scale")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of choice, uniform, log, integer and log_integer")
        if self.choice is None:
            low, high = self.range
            if not low < high:
                raise ValueError(f"{given[0]}=[{low}, {high}]: the first must be the smaller")
            if self.logarithmic and low <= 0:
                raise ValueError(f"{given[0]}=[{low}, {high}]: a logarithmic scale needs numbers above 0")
        return self

    @property
    def range(self) -> tuple[Number, Number]:
        """Least and largest number, of all but choices."""
        found = self.uniform or self.log or self.integer or self.log_integer
        if found is None:
            raise ValueError("choices have no range")
        return found

    @property
    def logarithmic(self) -> bool:
        """Whether the scale is."""
        return self.log is not None or self.log_integer is not None

    @property
    def whole(self) -> bool:
        """Whether values are integers."""
        return self.integer is not None or self.log_integer is not None

    @property
    def ends(self) -> tuple[Any, ...]:
        """Return values between which all others lie, or all choices."""
        return self.choice if self.choice is not None else self.range

    @property
    def tried(self) -> tuple[Any, ...]:
        """The same with a number between: a field of integers takes both ends of [16, 64], and no 34.3."""
        if self.choice is not None or self.whole:
            return self.ends
        low, high = map(float, self.range)
        return (*self.ends, low + 0.381966 * (high - low))

    @classmethod
    def declared(cls, space: Mapping[str, Any]) -> "DimensionSpec":
        """Return what :meth:`lossworks.losses.Declaration.search_space` says of one hyperparameter."""
        if space["type"] == "choice":
            return cls(choice=tuple(space["values"]))
        kind = {"number": ("uniform", "log"), "integer": ("integer", "log_integer")}[space["type"]]
        return cls.model_validate({kind[space["log"]]: (space["low"], space["high"])})


def loss_fields(entry: str | Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, DimensionSpec]]:
    """Return a loss's slug, what of it is fixed, and what is searched.

    Raises:
        UserError: There is no such loss or hyperparameter.
    """
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    slug = str(given.pop("name", ""))
    declared = declaration(slug)
    searched = {name: DimensionSpec.declared(space) for name, space in declared.search_space().items()}
    fixed: dict[str, Any] = {}
    for name, value in given.items():
        searched.pop(name, None)
        if isinstance(value, Mapping | list):
            searched[name] = DimensionSpec.parse(_as_dimension(value), source=f"losses.{slug}.{name}")
        else:
            fixed[name] = value
    for name in (*fixed, *searched):
        known = [parameter.name for parameter in declared.hyperparameters]
        if name not in known:
            raise UserError(
                f"losses: {slug} has no hyperparameter {name}; it has {', '.join(known) or 'none'}"
            )
    return slug, fixed, searched


def _as_dimension(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"choice": value}
