"""The spec of a sweep: what is trained, what is searched, and how."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lossworks.errors import UserError
from lossworks.specs import Spec, TrackingSpec
from lossworks.specs.base import Seed, Storage, apply_overrides
from lossworks.trainables import OWN_VALUES, Direction
from lossworks_tune.bases import read_base, require_yardstick
from lossworks_tune.sweeps.dimensions import DimensionSpec
from lossworks_tune.sweeps.space import Space


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
    seeds: tuple[Seed, ...] = Field(
        (1000, 1001, 1002, 1003, 1004), min_length=1, description="seeds that the search has not seen"
    )


class SweepSpec(Spec):
    """A search of losses and their hyperparameters, and of any other field of a training spec."""

    command: ClassVar[str | None] = "tune"
    inner: ClassVar[str | None] = "base"

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
    seeds: tuple[Seed, ...] = Field(
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
    storage: Storage = Field(None, description="absolute folder of runs; default: runs/ in the home folder")
    tracking: TrackingSpec = TrackingSpec()

    def make_space(self) -> Space:
        """Return what is searched.

        Raises:
            UserError: A loss or hyperparameter is unknown, or nothing is searched.
        """
        return Space(self.base, self.losses, self.space)

    def means(self, finals: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return each objective's mean over what several seeds have measured last.

        Args:
            finals: Metrics of at least one seed.

        Raises:
            UserError: An objective was not measured.
        """
        for metric in self.objectives:
            if any(metric not in final for final in finals):
                raise UserError(
                    f"objectives={metric}: was not reported; reported are {', '.join(sorted(finals[-1]))}"
                )
        return {metric: sum(final[metric] for final in finals) / len(finals) for metric in self.objectives}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        space = self.make_space()
        space.check()
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: the same seed twice gives the same result twice")
        seen = sorted(set(self.seeds) & set(self.confirm.seeds))
        if seen and self.confirm.top:
            raise ValueError(f"confirm.seeds={list(self.confirm.seeds)}: {seen} are no fresh seeds")
        self._require_yardsticks(space)
        self._require_matching(space)
        return self

    def _require_yardsticks(self, space: Space) -> None:
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

    def _require_matching(self, space: Space) -> None:
        kind, two = self.scheduler.kind, len(self.objectives) == 2
        if two and kind != "none":
            raise ValueError(f"scheduler.kind={kind} compares by one objective; with two it must be none")
        if self.search.kind == "nsga2" and not two:
            raise ValueError("search.kind=nsga2 is for two objectives")
        if self.scheduler.of_populations:
            self._require_population(space)

    def _require_population(self, space: Space) -> None:
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
        values["base"] = read_base(values.get("base", {}), cls.file(path).parent)
        # Overrides reach into it, since it has been read.
        return cls.parse(apply_overrides(cls, values, overrides), source=str(path))
