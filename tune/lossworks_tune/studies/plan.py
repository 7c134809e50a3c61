"""What a study trains: every variant in every setting with every seed."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lossworks.catalogue.registry import declaration
from lossworks.errors import UserError, require_one
from lossworks.specs.base import apply_overrides
from lossworks.trainables import Direction, Trainable, task_of, trainable

_UNTRAINED = ("name", "tracking", "storage")  # fields that change nothing of what is trained
_SEEDS = ("seed", "seeds")
_FIRST = "first:"  # before the name of a training that comes first, where its run is meant
_START = "start"  # the one from whose weights all variants begin, and the field that says so


@dataclass(frozen=True)
class Setting:
    """Values of the fields that a study varies for all its variants alike.

    Attributes:
        fields: By dotted name; none for a study that varies nothing else.
    """

    fields: Mapping[str, Any]

    @property
    def title(self) -> str:
        """It in words, such as ``data.label_noise=0.6``; empty where nothing else varies."""
        return ", ".join(f"{name}={shown(value)}" for name, value in self.fields.items())

    def fits(self, where: Mapping[str, Any]) -> bool:
        """Return whether it has certain values."""
        return all(self.fields[name] == value for name, value in where.items())


@dataclass(frozen=True, eq=False)
class Training:
    """One training of a study.

    Attributes:
        variant: Name of its variant; of one that comes before the variants, ``first:`` and its name.
        setting: Title of its setting.
        seed: Its seed.
        spec: Its spec, whole.
        digest: Of all in the spec that decides over the result.
    """

    variant: str
    setting: str
    seed: int
    spec: Any
    digest: str

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the others of its study."""
        return self.variant, self.setting, self.seed

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the trainings before it whose runs its spec names."""
        return _named(self.spec.model_dump(mode="json"))


class StudyPlan:
    """The trainings of a study.

    Args:
        base: Values of a spec of what is trained.
        compare: What differs from it in each variant, nested like the base.
        over: Further fields by dotted name, each with the values that it takes.
        seeds: Of each variant in each setting.
        first: Trainings by name of which each seed has its own before the variants: what differs from the
            base, or all fields where ``task`` is one of them.

    Attributes:
        task: Name of what is trained.
        trainable: What trains it.
        variants: Names of the variants.
        settings: All combinations of the further fields' values.
        seeds: As given.

    Raises:
        UserError: The base is wrong.
    """

    def __init__(
        self,
        base: Mapping[str, Any],
        compare: Mapping[str, Mapping[str, Any]],
        over: Mapping[str, Sequence[Any]],
        seeds: Sequence[int],
        first: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.task = task_of(base)
        self.trainable: Trainable = trainable(self.task)
        self._before: Any = self.trainable.parse(base, "base")
        self._first = dict(first or {})
        self._base: Any = self.trainable.parse(self._begun(base), "base")
        self._compare, self._over = compare, over
        self.variants, self.seeds = tuple(compare), tuple(seeds)
        values = itertools.product(*over.values())
        self.settings = tuple(Setting(dict(zip(over, chosen, strict=True))) for chosen in values)

    @cached_property
    def yardsticks(self) -> Mapping[str, Direction]:
        """The metrics that all variants report, and by which they are compared: each with its direction."""
        first = [self.training(variant, self.settings[0], self.seeds[0]) for variant in self.variants]
        known = [self.trainable.yardsticks(training.spec) for training in first]
        return {name: mode for name, mode in known[0].items() if all(name in of for of in known)}

    @cached_property
    def trainings(self) -> tuple[Training, ...]:
        """All trainings, setting by setting.

        Raises:
            UserError: A variant, setting or seed gives a spec that is refused.
        """
        order = itertools.product(self.settings, self.variants, self.seeds)
        return tuple(self.training(variant, setting, seed) for setting, variant, seed in order)

    @cached_property
    def firsts(self) -> tuple[Training, ...]:
        """The trainings that come before the variants, name by name.

        Raises:
            UserError: One gives a spec that is refused.
        """
        return tuple(self.first(name, seed) for name, seed in itertools.product(self._first, self.seeds))

    def first(self, name: str, seed: int) -> Training:
        """Return one training that comes before the variants.

        Raises:
            UserError: There is none of that name, a field is unknown or a value is refused.
        """
        where = f"first.{name}"
        fields = self._first[require_one(name, list(self._first), "training in first")]
        if "task" in fields:
            values: Mapping[str, Any] = nested(fields)
        else:
            values = self._with(self._before, dict(leaves(fields)), where)
        return self._made(f"{_FIRST}{name}", "", seed, values, where)

    def training(self, variant: str, setting: Setting, seed: int) -> Training:
        """Return one training.

        Raises:
            UserError: A field is unknown or a value is refused; the message names the variant or setting.
        """
        fields = dict(leaves(self._compare[variant])) | dict(setting.fields)
        where = f"compare.{variant}" + (f" with {setting.title}" if setting.title else "")
        values = self._with(self._base, fields, where)
        return self._made(variant, setting.title, seed, values, where)

    def _begun(self, base: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the base's values with the run that all variants begin from, if there is one."""
        if _START not in self._first:
            return base
        if base.get(_START) is not None:
            raise UserError(f"first.{_START}: base.{_START} is set, too; only one of them can be")
        return {**base, _START: f"{_FIRST}{_START}"}

    @staticmethod
    def _with(spec: Any, fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return a spec's values with other values of some fields."""
        overrides = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
        own = spec.model_dump(mode="json", exclude_unset=True)
        try:
            return apply_overrides(type(spec), own, overrides)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _made(self, variant: str, setting: str, seed: int, values: Mapping[str, Any], where: str) -> Training:
        spec: Any = self.trainable.parse(self.trainable.seeded(values, seed), where)
        needed = {name: self.first(name, seed).digest for name in self._needed(spec, variant, where)}
        return Training(variant, setting, seed, spec, _digest(spec, **({"first": needed} if needed else {})))

    def _needed(self, spec: Any, variant: str, where: str) -> tuple[str, ...]:
        """Return which trainings a spec names: of those that come first, only ones that come before it."""
        before = list(self._first)
        if variant.startswith(_FIRST):
            before = before[: before.index(variant.removeprefix(_FIRST))]
        found = _named(spec.model_dump(mode="json"))
        for name in found:
            if name not in before:
                known = ", ".join(before) or "none"
                raise UserError(f"{where}: {_FIRST}{name} is no training before it; those: {known}")
        return found

    def _check_firsts(self) -> None:
        """Refuse trainings that come before the variants and that nothing needs."""
        first = [self.training(variant, self.settings[0], self.seeds[0]) for variant in self.variants]
        needed = {name for one in (*first, *self.firsts) for name in one.needs}
        for name in self._first:
            if name not in needed:
                raise UserError(
                    f"first.{name}: nothing names it; write {_FIRST}{name} where its run is meant, or "
                    f"call it {_START} if all variants begin from it"
                )

    def placed(self, training: Training, folder: Callable[[Training], str]) -> dict[str, Any]:
        """Return a training's values with folders in the place of the names of trainings before it."""
        own = {f"{_FIRST}{name}": folder(self.first(name, training.seed)) for name in training.needs}
        found: dict[str, Any] = _replaced(training.spec.model_dump(mode="json"), own)
        return found

    def check(self) -> None:
        """Refuse what can't be compared.

        Raises:
            UserError: A field is unknown or set twice, a value is refused, or two variants are the same.
        """
        for name, values in self._over.items():
            self._check_setting(name, values)
        for variant, name in itertools.product(self.variants, self._over):
            if any(field == name for field, _ in leaves(self._compare[variant])):
                raise UserError(f"over.{name}: compare.{variant} sets it, too; only one of them can")
        varied = (*self._compare.values(), *self._first.values())
        names = {*self._over, *(field for fields in varied for field, _ in leaves(fields))}
        if seeded := names & set(_SEEDS):
            raise UserError(f"{min(seeded)}: seeds are the study's own field, seeds")
        for setting in self.settings:
            seen: dict[str, str] = {}
            for variant in self.variants:
                digest = self.training(variant, setting, self.seeds[0]).digest
                if digest in seen:
                    raise UserError(f"compare: {seen[digest]} and {variant} train the same")
                seen[digest] = variant
        self._check_firsts()

    def _check_setting(self, name: str, values: Sequence[Any]) -> None:
        if not values:
            raise UserError(f"over.{name}: has no values; give the list of those to compare at")
        if len({shown(value) for value in values}) < len(values):
            raise UserError(f"over.{name}={list(values)}: a value is there twice")
        try:
            apply_overrides(type(self._base), {}, [f"{name}={json.dumps(values[0])}"])
        except UserError as error:
            raise UserError(f"over.{name}: {error}") from None

    @property
    def notes(self) -> list[str]:
        """What limits what the study can say, in a sentence each."""
        found = []
        if len(self.seeds) == 1:
            found.append("one seed gives no interval, so that nothing is told apart; use seeds=5")
        seen: dict[str, str] = {}
        for variant in self.variants:
            spec = self.training(variant, self.settings[0], self.seeds[0]).spec
            same = _digest(spec, loss=_plain(spec.loss)) if hasattr(spec, "loss") else _digest(spec)
            if same in seen:
                found.append(f"{variant} is {seen[same]} with these hyperparameters: they differ by rounding")
            seen.setdefault(same, variant)
        return found

    @property
    def varies_the_loss(self) -> bool:
        """Whether the trained loss differs between trainings."""
        first = (self.training(v, s, self.seeds[0]) for v in self.variants for s in self.settings)
        return len({training.spec.loss.model_dump_json() for training in first}) > 1


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names and values of nested fields; an empty mapping is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with their dotted names taken apart: ``{"a.b": 1}`` as ``{"a": {"b": 1}}``.

    Raises:
        UserError: One field is a value and a group at once.
    """
    found: dict[str, Any] = {}
    for path, value in leaves(values):
        *parents, leaf = path.split(".")
        group = found
        for parent in parents:
            group = group.setdefault(parent, {})
            if not isinstance(group, dict):
                raise UserError(f"{path}: {parent} has a value already, so it can't have fields, too")
        group[leaf] = value
    return found


def _named(values: Any) -> tuple[str, ...]:
    """Return the names of trainings that come first, as values of a spec name them."""
    if isinstance(values, Mapping | list | tuple):
        inner = values.values() if isinstance(values, Mapping) else values
        return tuple(dict.fromkeys(name for value in inner for name in _named(value)))
    is_one = isinstance(values, str) and values.startswith(_FIRST)
    return (values.removeprefix(_FIRST),) if is_one else ()


def _replaced(values: Any, by: Mapping[str, str]) -> Any:
    """Return values with other texts in the place of some."""
    if isinstance(values, Mapping):
        return {name: _replaced(value, by) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_replaced(value, by) for value in values]
    return by.get(values, values) if isinstance(values, str) else values


def shown(value: Any) -> str:
    """Return a value as titles have it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(loss: Any) -> Any:
    """Return a loss as what it equals by its declaration, as plain data."""
    values = loss.model_dump(mode="json")
    if loss.plus:
        return values
    entry = declaration(loss.name)
    own = (loss.name, loss.hyperparameters)
    # Two losses may each name the other; the one that comes first in the alphabet stands for both.
    name, hyperparameters = min((own, entry.alias(entry.check(own[1])) or own), key=lambda pair: pair[0])
    return [name, declaration(name).check(hyperparameters), values.get("impl")]


def _digest(spec: Any, **instead: Any) -> str:
    """Return a digest of what a spec trains, with other values of some fields."""
    values = spec.model_dump(mode="json", exclude=set(_UNTRAINED)) | instead
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
