"""The space of a sweep: which fields of its base are varied, some only under one loss.

A *configuration* is a mapping of dotted fields of the base's spec to values. A searcher knows *parameters*
instead: hyperparameters of different losses share a name but no range, so theirs is ``ldr.temperature``.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lossworks.catalogue.registry import declaration
from lossworks.errors import UserError, nearest
from lossworks.specs import field_paths
from lossworks.specs.base import decides, is_open
from lossworks.trainables import Direction, Trainable, task_of, trainable
from lossworks_tune.bases import merged
from lossworks_tune.sweeps.dimensions import DimensionSpec, loss_fields

if TYPE_CHECKING:
    from optuna import Trial

Fields = dict[str, Any]
LOSS = "loss"

_OF_LOSSES = (
    "losses and their hyperparameters are the sweep's own field: "
    "losses: [cross-entropy, {name: ldr, temperature: {log: [0.1, 10]}}]"
)
_LENGTH = (
    "all configurations of a sweep are trained and measured alike; compare lengths by a study: "
    "over: {steps: [100, 200]}"
)
_DATA = (
    "all configurations of a sweep are measured on the same data; compare data by a study: "
    "over: {data.held_out_fraction: [0.1, 0.2]}"
)
_CHANGES_NOTHING = "changes nothing of what is trained"
_NOT_SEARCHED = {
    **dict.fromkeys(("seed", "seeds"), "seeds are the sweep's own field, seeds"),
    LOSS: _OF_LOSSES,
    **dict.fromkeys(("steps", "rounds", "evaluation", "measure"), _LENGTH),
    **dict.fromkeys(("name", "kind", "tracking", "storage", "checkpoint", "profile"), _CHANGES_NOTHING),
    **dict.fromkeys(("telemetry", "checkpoint_every", "resources_per_worker"), _CHANGES_NOTHING),
    **dict.fromkeys(("workers", "elastic", "sharding", "max_failures"), _CHANGES_NOTHING),
    **dict.fromkeys(("activation_checkpointing", "compile", "analyses", "engine"), _CHANGES_NOTHING),
    **dict.fromkeys(("data", "split"), _DATA),
    "task": "a sweep trains one task",
}
"""Why groups of fields are none that a search can vary."""

_PREPARES_INPUTS = frozenset(("data.standardise", "data.standardise_targets", "data.image_size"))
"""Fields of the data that leave what is predicted and measured as it is."""


@dataclass(frozen=True)
class Candidate:
    """A loss to consider: what of it is fixed and what is searched."""

    slug: str
    fixed: dict[str, Any]
    searched: dict[str, DimensionSpec]


class Space:
    """What a sweep searches.

    Args:
        base: Values of a spec of what is trained.
        losses: Losses to consider, as a sweep's spec has them; the base's own if there are none.
        general: What further fields of the base are searched over.

    Attributes:
        task: Name of what is trained.
        trainable: What trains it.
        base: The base's spec, whole.
        candidates: The losses.
        general: As given.

    Raises:
        UserError: The base is wrong, a loss or hyperparameter is unknown, or nothing is searched.
    """

    def __init__(
        self,
        base: Mapping[str, Any],
        losses: Sequence[str | Mapping[str, Any]],
        general: Mapping[str, DimensionSpec],
    ) -> None:
        self.task = task_of(base)
        self.trainable: Trainable = trainable(self.task)
        self.base: Any = self.trainable.parse(base, "base")
        self._values = self.base.model_dump(mode="json", exclude_unset=True)
        self.candidates = [Candidate(*loss_fields(entry)) for entry in losses or (self._own_loss(),)]
        self.general = dict(general)
        # The hyperparameters of the base's own loss are not another's.
        self._values["loss"] = {n: v for n, v in self._values.get("loss", {}).items() if n == "impl"}
        slugs = [candidate.slug for candidate in self.candidates]
        twice = next((slug for slug in slugs if slugs.count(slug) > 1), None)
        if twice:
            raise UserError(f"losses: {twice} is there twice")
        if len(self.candidates) == 1 and not self.general and not self.candidates[0].searched:
            raise UserError(
                f"the space is empty: {slugs[0]} has nothing to search; name several losses, or fields in "
                "space"
            )

    @property
    def yardsticks(self) -> Mapping[str, Direction]:
        """The metrics by which trainings can be compared, each with its better direction."""
        return self.trainable.yardsticks(self.base)

    @property
    def varies_the_loss(self) -> bool:
        """Whether the trained loss differs between configurations."""
        of_loss = any(name.startswith("loss.") for name in self.general)
        return of_loss or len(self.candidates) > 1 or bool(self.candidates[0].searched)

    @property
    def dimensions(self) -> dict[str, DimensionSpec]:
        """Every searched parameter by its name, and the loss where there are several."""
        found = {}
        if len(self.candidates) > 1:
            found[LOSS] = DimensionSpec(choice=tuple(candidate.slug for candidate in self.candidates))
        found |= self.general
        for candidate in self.candidates:
            found |= {f"{candidate.slug}.{name}": of for name, of in candidate.searched.items()}
        return found

    def draw(self, trial: "Trial") -> None:
        """Ask an Optuna trial for the parameters of one configuration."""
        slug = self.candidates[0].slug
        if len(self.candidates) > 1:
            slug = trial.suggest_categorical(LOSS, [candidate.slug for candidate in self.candidates])
        for name, dimension in self._dimensions_under(slug):
            _suggest(trial, name, dimension)

    def grid(self, points: int) -> Iterator[dict[str, Any]]:
        """Yield the parameters of every configuration with so many values of each number."""
        for candidate in self.candidates:
            named = self._dimensions_under(candidate.slug)
            for values in itertools.product(*(_points(dimension, points) for _, dimension in named)):
                yield {LOSS: candidate.slug, **dict(zip((name for name, _ in named), values, strict=True))}

    def fields(self, parameters: Mapping[str, Any]) -> Fields:
        """Return the configuration of a searcher's parameters; those of other losses are left."""
        candidate = self._candidate(parameters.get(LOSS, self.candidates[0].slug))
        prefix = f"{candidate.slug}."
        own = {n.removeprefix(prefix): v for n, v in parameters.items() if n.startswith(prefix)}
        general = {name: parameters[name] for name in self.general if name in parameters}
        return self._of_loss(candidate, own) | general

    def anchors(self) -> list[tuple[str, Fields]]:
        """Return what every sweep contains: each loss at its defaults, and where it equals its parent.

        Only against the latter is it seen whether a further hyperparameter helps at all.
        """
        found: list[tuple[str, Fields]] = []
        for candidate in self.candidates:
            declared = declaration(candidate.slug)
            found.append((f"{candidate.slug}, defaults", self._of_loss(candidate, {})))
            case = next(iter(declared.cases), None)
            if declared.neutral is not None:
                case = next(case for case in declared.cases if case.hyperparameters == declared.neutral)
            if case is not None and declared.check(case.hyperparameters) != declared.check(candidate.fixed):
                title = f"{candidate.slug} as {case.equals}"
                found.append((title, self._of_loss(candidate, case.hyperparameters)))
        return found

    def values(self, fields: Fields, seed: int) -> dict[str, Any]:
        """Return the values of a training's spec."""
        nested: dict[str, Any] = {}
        for name, value in fields.items():
            *parents, leaf = name.split(".")
            group = nested
            for parent in parents:
                group = group.setdefault(parent, {})
            group[leaf] = value
        return self.trainable.seeded(merged(self._values, nested), seed)

    def training(self, fields: Fields, seed: int) -> Any:
        """Return the spec of a training.

        Raises:
            UserError: The base's class refuses it.
        """
        return self.trainable.parse(self.values(fields, seed), "base")

    def corners(self) -> Iterator[tuple[str, Fields]]:
        """Yield configurations with the ends of one dimension each, and a value between, and its name."""
        for candidate in self.candidates:
            usual = self._of_loss(candidate, {})
            yield "", usual
            for name, dimension in candidate.searched.items():
                for value in dimension.tried:
                    yield f"{candidate.slug}.{name}", usual | {f"loss.{name}": value}
            for name, dimension in self.general.items():
                for value in dimension.tried:
                    yield name, usual | {name: value}

    def check(self) -> None:
        """Refuse what the base's class refuses: at the ends of every dimension, one at a time.

        A field that decides what stands beside it, such as ``optimizer.kind``, is tried with each of those.

        Raises:
            UserError: A field is unknown, is none that a search can vary, or a value is refused.
        """
        model = type(self.base)
        known = set(field_paths(model))
        for name in self.general:
            group = name.partition(".")[0]
            if group in _NOT_SEARCHED and name not in _PREPARES_INPUTS:
                raise UserError(f"space.{name}: {_NOT_SEARCHED[group]}")
            if name not in known and not is_open(model, name.rpartition(".")[0]):
                guess = nearest(name, known)
                hint = f"; did you mean {guess}?" if guess else ""
                raise UserError(f"space.{name}: is no field of the base{hint}")
        for fields in (*(fields for _, fields in self.corners()), *self._decided()):
            self.training(fields, 0)

    def _decided(self) -> Iterator[Fields]:
        """Yield each value of a field that decides over others together with the ends of each of those."""
        usual = self._of_loss(self.candidates[0], {})
        for decider in (name for name in self.general if decides(type(self.base), name)):
            group = decider.rpartition(".")[0]
            beside = [name for name in self.general if name.rpartition(".")[0] == group and name != decider]
            for name in beside:
                for kind, value in itertools.product(self.general[decider].tried, self.general[name].tried):
                    yield usual | {decider: kind, name: value}

    def _own_loss(self) -> dict[str, Any]:
        given = self._values.get("loss", {})
        return {"name": self.base.loss.name, **{name: of for name, of in given.items() if name != "impl"}}

    def _candidate(self, slug: str) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.slug == slug)

    def _dimensions_under(self, slug: str) -> list[tuple[str, DimensionSpec]]:
        own = {f"{slug}.{name}": of for name, of in self._candidate(slug).searched.items()}
        return [*self.general.items(), *own.items()]

    def _of_loss(self, candidate: Candidate, own: Mapping[str, Any]) -> Fields:
        values = {**candidate.fixed, **own}
        return {"loss.name": candidate.slug, **{f"loss.{name}": value for name, value in values.items()}}


def _suggest(trial: "Trial", name: str, dimension: DimensionSpec) -> None:
    if dimension.choice is not None:
        trial.suggest_categorical(name, list(dimension.choice))
        return
    low, high = dimension.range
    if dimension.whole:
        trial.suggest_int(name, int(low), int(high), log=dimension.logarithmic)
    else:
        trial.suggest_float(name, low, high, log=dimension.logarithmic)


def _points(dimension: DimensionSpec, count: int) -> list[Any]:
    """Return evenly spaced values, ends included, or all choices."""
    if dimension.choice is not None:
        return list(dimension.choice)
    low, high = map(float, dimension.range)
    shares = [index / (count - 1) for index in range(count)]
    if dimension.logarithmic:
        found = [math.exp(math.log(low) + share * math.log(high / low)) for share in shares]
    else:
        found = [low + share * (high - low) for share in shares]
    found = [low, *found[1:-1], high]
    return list(dict.fromkeys(round(value) for value in found)) if dimension.whole else found
