"""The spec of a sweep: what is trained, what is searched, and how."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lossworks.catalogue.registry import declaration
from lossworks.errors import UserError, nearest
from lossworks.specs import Spec, TrackingSpec
from lossworks.specs.base import apply_overrides, read_yaml, suggest_kind
from lossworks.trainables import OWN_VALUES, Direction

if TYPE_CHECKING:
    from lossworks_tune.space import Space

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

    @classmethod
    def declared(cls, space: Mapping[str, Any]) -> "DimensionSpec":
        """Return what :meth:`lossworks.losses.Declaration.search_space` says of one hyperparameter."""
        if space["type"] == "choice":
            return cls(choice=tuple(space["values"]))
        kind = {"number": ("uniform", "log"), "integer": ("integer", "log_integer")}[space["type"]]
        return cls.model_validate({kind[space["log"]]: (space["low"], space["high"])})


class SearchSpec(Spec):
    """How configurations are chosen; ``search=tpe`` is short for ``search.kind=tpe``."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["random", "grid", "tpe", "nsga2"] = Field(
        "random",
        description="random; grid; tpe (Optuna's tree-structured Parzen estimator, of one or two "
        "objectives); nsga2 (Optuna's genetic algorithm, for two objectives)",
    )
    points: int = Field(3, ge=2, le=100, description="of kind=grid: values of each number, ends included")
    startup: int = Field(10, ge=1, description="of kind=tpe: configurations drawn at random first")


class SchedulerSpec(Spec):
    """When configurations stop early; ``scheduler=asha`` is short for ``scheduler.kind=asha``."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["none", "asha", "hyperband", "median", "pbt", "pb2"] = Field(
        "none",
        description="Ray Tune's: none; asha (asynchronous successive halving); hyperband; median (stops what "
        "is below the others' median); pbt (population-based training: the worst take over the best's "
        "parameters and change their hyperparameters; one seed, engine=packed); pb2 (the same, with changes "
        "that a Gaussian process chooses)",
    )
    grace_steps: int | None = Field(
        None,
        ge=1,
        description="steps before any stop, or between changes of a population; one evaluation if unset",
    )
    reduction: float = Field(3.0, gt=1.0, le=100.0, description="η: one in so many goes on at each rung")

    @property
    def of_populations(self) -> bool:
        """Whether it hands parameters from one configuration to another."""
        return self.kind in ("pbt", "pb2")


class ConfirmSpec(Spec):
    """The best configurations trained again on fresh seeds, before a winner is named."""

    top: int = Field(3, ge=0, le=1000, description="how many; 0 for none")
    seeds: tuple[int, ...] = Field(
        (1000, 1001, 1002, 1003, 1004), min_length=1, description="seeds that the search has not seen"
    )


class SweepSpec(Spec):
    """A search of losses and their hyperparameters, and of any other field of a training spec."""

    command: ClassVar[str | None] = "tune"

    kind: Literal["sweep"] = Field("sweep", description="what the spec describes")
    name: str = Field("tune", min_length=1, max_length=100, description="name of the run in MLflow")
    base: dict[str, Any] = Field(
        default_factory=dict,
        description="spec of the training that is varied, as `lossworks train` or `lossworks federate` takes "
        "it; in a file also the path of one, from the file's folder, or spec: PATH with what differs from it",
    )
    losses: tuple[str | dict[str, Any], ...] = Field(
        (),
        description="losses to consider, by slug or as {name: ldr, margin: 0, temperature: {log: [0.1, 10]}}"
        "; what is left open is searched as the catalogue declares; default: the base's loss",
    )
    space: dict[str, DimensionSpec] = Field(
        default_factory=dict, description="further fields of the base: {optimizer.lr: {log: [1e-4, 1e-2]}}"
    )
    objectives: dict[str, Direction] = Field(
        {"eval/accuracy": "max"},
        min_length=1,
        max_length=2,
        description="yardsticks of what is trained, each with the better of min and max; two give a Pareto "
        "front",
    )
    search: SearchSpec = SearchSpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    trials: int = Field(
        32,
        ge=1,
        le=100_000,
        description="configurations drawn, besides each loss at its defaults and where it equals its parent; "
        "a grid has as many as it has",
    )
    time_s: float | None = Field(
        None, gt=0.0, description="seconds after which no further configuration is begun; null for no limit"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the search itself")
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="seeds of each configuration's trainings, one after the other"
    )
    wilcoxon: float = Field(
        0.1,
        ge=0.0,
        lt=1.0,
        description="a configuration whose seeds are worse than the leader's on the same seeds with such a p "
        "(one-sided signed-rank test) is stopped before its other seeds; 0 for never",
    )
    confirm: ConfirmSpec = ConfirmSpec()
    engine: Literal["auto", "packed", "ray"] = Field(
        "auto",
        description="packed (small classifiers, many at once in this process), ray (each a trial of Ray "
        "Tune, trained by Ray Train or Flower); auto takes packed where it can",
    )
    at_once: int | None = Field(
        None, ge=1, description="configurations at work; default: 64 packed, on Ray as many as have room"
    )
    storage: str | None = Field(
        None, description="absolute folder of runs; default: runs/ in the home folder"
    )
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        from lossworks_tune.space import Space

        space = Space(self)  # checks losses and fields
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: the same seed twice gives the same result twice")
        seen = sorted(set(self.seeds) & set(self.confirm.seeds))
        if seen and self.confirm.top:
            raise ValueError(f"confirm.seeds={list(self.confirm.seeds)}: {seen} are no fresh seeds")
        self._require_yardsticks(space)
        self._require_matching(space)
        return self

    def _require_yardsticks(self, space: "Space") -> None:
        for metric, mode in self.objectives.items():
            better = require_yardstick(metric, space.yardsticks, "objectives")
            if mode != better:
                raise ValueError(
                    f"objectives={{{metric}: {mode}}}: the better {metric} is the "
                    f"{'larger' if better == 'max' else 'smaller'} one; write {metric}: {better}"
                )
            if metric in OWN_VALUES and space.varies_the_loss:
                raise ValueError(
                    f"objectives={metric}: the value of the trained loss compares no losses or settings of "
                    "one (a smaller temperature alone makes it smaller); use a yardstick such as "
                    f"{next(name for name in space.yardsticks if name not in OWN_VALUES)}"
                )

    def _require_matching(self, space: "Space") -> None:
        kind, two = self.scheduler.kind, len(self.objectives) == 2
        if two and kind != "none":
            raise ValueError(f"scheduler.kind={kind} compares by one objective; with two it must be none")
        if self.search.kind == "nsga2" and not two:
            raise ValueError("search.kind=nsga2 is for two objectives")
        if self.scheduler.of_populations:
            self._require_population(space)

    def _require_population(self, space: "Space") -> None:
        kind = self.scheduler.kind
        if len(self.seeds) > 1:
            raise ValueError(
                f"scheduler.kind={kind} changes hyperparameters within a run, which has one seed; "
                f"seeds={list(self.seeds)} are {len(self.seeds)}"
            )
        if self.search.kind != "random":
            raise ValueError(
                f"scheduler.kind={kind} starts from random configurations, not search.kind={self.search.kind}"
            )
        if kind == "pb2" and all(dimension.choice is not None for dimension in space.dimensions.values()):
            raise ValueError("scheduler.kind=pb2 chooses numbers, and only choices are searched; use pbt")

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Return the sweep in a YAML file; paths in it are taken from its folder.

        Raises:
            UserError: The file is missing, is no YAML mapping, or holds a wrong value.
        """
        values = cls.read_values(path)
        values["base"] = _read_base(values.get("base", {}), Path(path).parent)
        # Overrides reach into it, since it has been read.
        return cls.parse(apply_overrides(cls, values, overrides), source=str(path))


def require_yardstick(name: str, known: Mapping[str, Direction], field: str) -> Direction:
    """Return the better direction of a yardstick.

    Raises:
        UserError: There is none of that name; the message names the field, and the nearest or all of them.
    """
    if name in known:
        return known[name]
    guess = nearest(name, known)
    hint = f"did you mean {guess}?" if guess else f"there are {', '.join(known)}"
    raise UserError(f"{field}={name}: is no yardstick of what is trained; {hint}")


def _read_base(base: Any, folder: Path) -> Any:
    """Return a base with the file that it names, if any, read."""
    if isinstance(base, str):
        return _read_file(folder / base)
    if isinstance(base, dict) and "spec" in base:
        own = {name: value for name, value in base.items() if name != "spec"}
        return merged(_read_file(folder / str(base["spec"])), own)
    return base


def _read_file(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    suggest_kind(values, path)
    return values


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


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with another's values over it, group by group."""
    found = dict(under)
    for name, value in over.items():
        below = found.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            found[name] = merged(below, value)
        else:
            found[name] = value
    return found
