"""Frozen, checked records read from YAML with ``key.path=value`` overrides."""

import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lossworks.errors import UserError, nearest, redact, shortened
from lossworks.specs.shipped import shipped_specs, spec_file
from lossworks.specs.yaml_text import YamlError, read_value, read_yaml_file

_TOLD = 8  # mistakes of a spec that one message names


def _absolute(value: str | None) -> str | None:
    if value is not None and not value.startswith("/"):
        raise ValueError(f"must be an absolute path, such as {Path(value).absolute()}")
    return value


Seed = Annotated[int, Field(ge=0, lt=2**32)]
Storage = Annotated[str | None, AfterValidator(_absolute)]
"""A folder that other processes and nodes find alike."""


@dataclass(frozen=True)
class SpecKind:
    """What a spec file can describe, as its line ``kind: …`` says.

    Attributes:
        noun: It in words.
        command: The command that runs it.
        fields: Fields that other kinds have not, by which files without that line are recognised.
    """

    noun: str
    command: str
    fields: tuple[str, ...]


KINDS = {
    "study": SpecKind("a study", "study", ("compare",)),
    "sweep": SpecKind("a sweep", "tune", ("base",)),
    "federation": SpecKind("a federation", "federate", ("strategies", "rounds", "split")),
    "training": SpecKind("a training", "train", ("steps",)),
}


def kind_of(values: Mapping[str, Any], source: str = "spec") -> str | None:
    """Return which of :data:`KINDS` a spec's values describe, told by their fields if they don't say it.

    Returns:
        The kind; None if it is not said and no field tells.

    Raises:
        UserError: They say a kind that there is not.
    """
    if "kind" not in values:
        return next((name for name, kind in KINDS.items() if values.keys() & set(kind.fields)), None)
    kind = values["kind"]
    if kind not in list(KINDS):
        guess = nearest(str(kind), KINDS)
        hint = f"did you mean {guess}?" if guess else f"it must be one of {', '.join(KINDS)}"
        raise UserError(f"{source}: kind={kind!r}: there is no such kind of spec; {hint}")
    return str(kind)


class Spec(BaseModel):
    """Base of all specs: frozen, unknown keys refused, every number with its range.

    Attributes:
        command: The command that runs what the spec describes; None for the groups within. A spec that has
            one also has a field ``kind`` with that entry of :data:`KINDS`.
        shorthand: The field that a plain value sets where the whole group is meant, as ``sharding=fsdp`` sets
            ``sharding.kind``; None if a plain value is a mistake.
        open_to: The field whose value decides what further fields there are, as ``loss.name`` decides the
            loss's hyperparameters; None if the class has them all. Such a class checks them itself.
        list_tail: The field that holds the further items where a list stands for the whole group, whose first
            item is the group itself; None if a list is a mistake.
        inner: The field that holds a whole spec of another kind, as a sweep's ``base`` holds a training's;
            None if there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    command: ClassVar[str | None] = None
    shorthand: ClassVar[str | None] = None
    open_to: ClassVar[str | None] = None
    list_tail: ClassVar[str | None] = None
    inner: ClassVar[str | None] = None

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema with what is short for the whole group."""
        whole = handler.resolve_ref_schema(handler(core))
        short = [whole["properties"][cls.shorthand]] if cls.shorthand else []
        if cls.list_tail:
            short.append({"type": "array", "items": {}, "minItems": 1})
        return {"anyOf": [whole, *short]} if short else whole

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        return _expanded(cls, values)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, source: str = "spec") -> Self:
        """Return the spec for nested ``values``.

        Raises:
            UserError: Naming every wrong field by its dotted path, its value and what would be right.
        """
        cls.require_own(values, source)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{source}: {_explain(cls, error)}") from None

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Return the spec in the YAML file ``path`` with ``key.path=value`` overrides applied.

        Raises:
            UserError: The file is missing, is no YAML mapping, or holds a wrong value.
        """
        values = cls.read_values(path)
        return cls.parse(apply_overrides(cls, values, overrides), source=str(path))

    @classmethod
    def read_values(cls, path: str | Path) -> dict[str, Any]:
        """Return the values in a YAML file of this kind; say on stderr if it doesn't name its kind.

        Raises:
            UserError: The file is missing, is no YAML mapping, or is of another kind.
        """
        values = read_yaml(cls.file(path))
        cls.require_own(values, str(path))
        own = next((name for name, kind in KINDS.items() if kind.command == cls.command), None)
        suggest_kind(values, path, own)
        return values

    @classmethod
    def file(cls, path: str | Path) -> Path:
        """Return the file of a spec of this kind: the one that is named, or one that comes along.

        Raises:
            UserError: Several of this kind have the name.
        """
        return spec_file(path, lambda file: command_of(read_yaml_file(file)) == cls.command)

    @classmethod
    def require_own(cls, values: Mapping[str, Any], source: str) -> None:
        """Refuse what another command runs, rather than each of its fields.

        Raises:
            UserError: Naming that command.
        """
        if cls.command is None:
            return
        kind = kind_of(values, source)
        if kind and KINDS[kind].command != cls.command:
            noun, command = KINDS[kind].noun, KINDS[kind].command
            raise UserError(f"{source}: describes {noun}, which `lossworks {command}` runs and resumes")

    def override(self, overrides: Sequence[str]) -> Self:
        """Return a copy with ``key.path=value`` overrides applied and everything checked again.

        Raises:
            UserError: An override names no field, or its value is out of range.
        """
        values = self.model_dump(mode="json", exclude_unset=True)
        return self.parse(apply_overrides(type(self), values, overrides))

    def further_fields(self) -> list[tuple[str, str, str]]:
        """Return name, meaning and allowed values of fields that the class itself has not."""
        return []

    def to_yaml(self) -> str:
        """Return the whole resolved spec as YAML; ``parse`` of it gives the same spec."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """Return the leaves as ``{"model.layers": 4, ...}``, for parameter tables."""
        return dict(_leaves(self.model_dump(mode="json")))


class OpenSpec(Spec):
    """Base of specs whose field :attr:`Spec.open_to` decides what further fields stand beside it.

    A subclass checks the further fields in its own validator, and fills in those that were not given.
    """

    model_config = ConfigDict(extra="allow")

    @model_serializer(mode="wrap")
    def _without_unset(self, plain: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """Leave out further fields that were filled in where pydantic leaves out what was not set."""
        values: dict[str, Any] = plain(self)
        kept = self.model_fields_set if info.exclude_unset else values.keys()
        return {name: value for name, value in values.items() if name in kept}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file: the one that is named, or one that comes with the installation.

    Raises:
        UserError: What is wrong with the file.
    """
    try:
        values = read_yaml_file(spec_file(path))
    except FileNotFoundError:
        guess = nearest(Path(path).stem, [file.stem for file in shipped_specs().values()])
        hint = f"; did you mean {guess}? `lossworks specs` lists those that come along" if guess else ""
        raise UserError(f"{path}: no such spec file{hint}") from None
    except YamlError as error:
        raise UserError(f"{path}: {error}") from None
    if values is None:
        raise UserError(f"{path}: is empty; a spec is a mapping of keys to values")
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}; a spec is a mapping of keys to values")
    return values


def command_of(values: Mapping[str, Any]) -> str:
    """Return which command runs a spec; every field of a training may be left out."""
    return KINDS[kind_of(values) or "training"].command


def suggest_kind(values: Mapping[str, Any], path: str | Path, usual: str | None = None) -> None:
    """Say on stderr which line a spec's file lacks if it doesn't say its kind; once for each file.

    Args:
        values: What the file holds.
        path: The file.
        usual: Its kind if no field tells it.
    """
    kind = kind_of(values, str(path)) or usual
    if kind and "kind" not in values:
        _hint(str(path), kind)


@cache
def _hint(path: str, kind: str) -> None:
    says = "does not say what it describes; add the line"
    print(f"lossworks: hint: {path} {says} `kind: {kind}`", file=sys.stderr)


def apply_overrides(
    model: type[BaseModel], values: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """Return ``values`` with each ``key.path=value`` set; values are read as YAML.

    Raises:
        UserError: An override has no ``=`` or names no field of ``model``.
    """
    result: dict[str, Any] = _copy(values)
    settings = [_setting(model, text) for text in overrides]
    # What decides over other fields comes first, since a change of it drops them.
    for key, new, text in sorted(settings, key=lambda setting: not decides(model, setting[0])):
        _set(model, result, key, new, text)
    return result


def _setting(model: type[BaseModel], text: str) -> tuple[str, Any, str]:
    """Take an override apart into the dotted path, the value and itself."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"override {text!r}: write it as key.path=value")
    _require_known(model, key)
    try:
        new = read_value(value, as_text=_is_text(model, key))
    except YamlError as error:
        raise UserError(f"override {shortened(redact(text))!r}: the value {error}") from None
    group = _group_at(model, key)
    if getattr(group, "list_tail", None) is not None and isinstance(new, list):
        new = _expanded(group, new)
    shorthand = getattr(group, "shorthand", None)
    return key if shorthand is None or isinstance(new, dict) else f"{key}.{shorthand}", new, text


def _is_text(model: type[BaseModel], key: str) -> bool:
    """Return whether the field at a dotted path takes text, and nothing else but null."""
    group, _, leaf = key.rpartition(".")
    owner = _group_at(model, group) if group else model
    field = owner.model_fields.get(leaf) if owner is not None else None
    if field is None:
        return False
    return {*typing.get_args(field.annotation), field.annotation} & {str} != set() and not (
        {*typing.get_args(field.annotation)} - {str, type(None)}
    )


def decides(model: type[BaseModel], key: str) -> bool:
    """Return whether a dotted path names a field that decides what fields stand beside it."""
    group, _, leaf = key.rpartition(".")
    return bool(group) and getattr(_group_at(model, group), "open_to", None) == leaf


def is_open(model: type[BaseModel], path: str) -> bool:
    """Return whether a dotted path names a group whose further fields one of its fields decides."""
    return getattr(_group_at(model, path), "open_to", None) is not None


def _set(model: type[BaseModel], values: dict[str, Any], key: str, new: Any, text: str) -> None:
    """Set what a dotted path names, making the groups on the way."""
    *parents, leaf = key.split(".")
    for depth, name in enumerate(parents, start=1):
        values[name] = _expanded(_group_at(model, ".".join(parents[:depth])), values.get(name, {}))
        values = values[name]
        if not isinstance(values, dict):
            raise UserError(f"override {text!r}: {name} is a value, not a group of keys")
    if decides(model, key):
        own = _group_at(model, ".".join(parents))
        if values.get(getattr(own, "list_tail", None) or ""):
            values.clear()  # a list is replaced as a whole, its first item's weight included
        elif own is not None and values.get(leaf, own.model_fields[leaf].default) != new:
            for name in values.keys() - own.model_fields.keys():
                del values[name]
    values[leaf] = new


def field_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every field, groups included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        group = _group(field.annotation)
        if group is not None:
            yield from field_paths(group, f"{prefix}{name}.")


def _group(annotation: Any) -> type[BaseModel] | None:
    """Return the spec class inside an annotation such as ``ModelSpec`` or ``ModelSpec | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((group for part in typing.get_args(annotation) if (group := _group(part))), None)
    return None


def _group_at(model: type[BaseModel] | None, path: str) -> type[BaseModel] | None:
    """Return the spec class of the group that a dotted path names, or None where it names a value."""
    for name in path.split("."):
        field = model.model_fields.get(name) if model is not None else None
        model = _group(field.annotation) if field is not None else None
    return model


def _expanded(group: type[BaseModel] | None, values: Any) -> Any:
    """Return a plain value, or a list, that stands for a whole group as the mapping it is short for."""
    shorthand = getattr(group, "shorthand", None)
    tail = getattr(group, "list_tail", None)
    if tail is not None and isinstance(values, list | tuple) and values:
        head = _expanded(group, values[0])
        return {**head, tail: list(values[1:])} if isinstance(head, Mapping) else values
    plain = shorthand is not None and not isinstance(values, Mapping | BaseModel)
    return {shorthand: values} if plain else values


def _require_known(model: type[BaseModel], key: str) -> None:
    known = list(field_paths(model))
    free = [path for path in known if _is_mapping(model, path) or is_open(model, path)]
    if key in known or any(key.startswith(f"{path}.") for path in free):
        return
    raise UserError(_unknown(model, key, known))


def _unknown(model: type[BaseModel], key: str, known: Sequence[str]) -> str:
    key = shortened(key)
    deeper = [path for path in known if path.endswith(f".{key}")]
    guess = " or ".join(deeper[:3]) or nearest(key, known)
    group = key.rpartition(".")[0]
    beside = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == group]
    hint = f"; did you mean {guess}?" if guess else f"; known keys: {', '.join(beside or known)}"
    inner, misspelt = getattr(model, "inner", None), nearest(key, known, cutoff=0.8)
    if inner and not misspelt and key.split(".")[0] not in known:
        hint += f"; a field of what is trained is written {inner}.{key}"
    return f"{key}: unknown key{hint}"


def _is_mapping(model: type[BaseModel], path: str) -> bool:
    head, _, rest = path.partition(".")
    annotation = model.model_fields[head].annotation
    group = _group(annotation)
    if rest and group is not None:
        return _is_mapping(group, rest)
    return typing.get_origin(annotation) is dict


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """Return one line that names every wrong field."""
    known = list(field_paths(model))
    parts = []
    found = _without_followers(error.errors(include_url=False))
    for item in found[:_TOLD]:
        path = ".".join(str(name) for name in item["loc"])
        place = _in_lists(model, item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "too_short":
            message = f"give at least {item['ctx']['min_length']}"
        if item["type"] == "extra_forbidden":
            parts.append(_unknown(model, path, known))
        elif item["type"] == "missing":
            parts.append(f"{place}: is required")
        elif not path:
            parts.append(message)
        elif _group_at(model, path) is not None and item["type"] == "value_error":
            parts.append(f"{place}: {message}")
        else:
            shown = shortened(redact(repr(item["input"])))
            guess = _nearest_choice(item)
            hint = f"; did you mean {guess}?" if guess else ""
            parts.append(f"{place}={shown}: {message[0].lower()}{message[1:]}{hint}")
    if len(found) > _TOLD:
        parts.append(f"and {len(found) - _TOLD} more")
    return "; ".join(parts)


def _without_followers(found: list[Any]) -> list[Any]:
    """Leave out lists that are only found too short because items of them were refused."""
    lists = {item["loc"][:-1] for item in found if item["loc"]}
    return [item for item in found if item["type"] != "too_short" or item["loc"] not in lists]


def _nearest_choice(item: Any) -> str | None:
    """Return which of a field's few values was meant, of a mistake that pydantic found."""
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return None
    return nearest(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))


def _in_lists(model: type[BaseModel], place: Sequence[str | int]) -> str:
    """Return a place as dotted text; items of a list that stands for a group have their own numbers."""
    names: list[str] = []
    for name in place:
        tail = getattr(_group_at(model, ".".join(names[:-1])), "list_tail", None) if names else None
        if isinstance(name, int) and tail is not None and names[-1] == tail:
            names[-1] = str(name + 1)  # the first item is the group itself
        else:
            names.append(str(name))
    return ".".join(names)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _copy(values: Any) -> Any:
    return {name: _copy(value) for name, value in values.items()} if isinstance(values, Mapping) else values
