"""YAML as specs are written in it: JSON's types alone, no key twice, and nothing that grows while it is read.

Numbers, booleans and null are those of YAML 1.2's core schema, so that ``1e-4`` is a number and ``on``,
``1:30`` and ``2026-11-27`` are text. A number that begins with a zero, such as ``007``, is text as well.
"""

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lossworks.errors import UserError, shortened

_Base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LARGEST = 2**20  # bytes of a file
_DEEPEST = 40  # mappings and lists within one another
_WHOLE, _POWER = "(0|[1-9][0-9]{0,30})", "[eE][-+]?[0-9]{1,4}"  # longer ones are text
_MOST = 100_000  # values, those counted that an alias repeats


class YamlError(ValueError):
    """A text that can't be read, with what is wrong in words."""


class _Loader(_Base):  # type: ignore[valid-type,misc]
    """Reads mappings without two equal keys."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML copies it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping, refusing a key that is there twice or is no word or number."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(f"line {line}: a key must be a word or a number, not a list or a mapping")
            if key.value in seen:
                raise YamlError(f"line {line}: the key {key.value!r} is there twice, and only one can hold")
            seen.add(key.value)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return found


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", rf"[-+]?{_WHOLE}", "-+0123456789"),
    ("float", rf"[-+]?(\.[0-9]+({_POWER})?|{_WHOLE}(\.[0-9]*({_POWER})?|{_POWER}))", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_text(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        YamlError: It is no YAML, holds a key twice or a character that text can't have, or is too large.
    """
    if len(text) > _LARGEST:
        raise YamlError(f"holds {len(text):,} characters; a spec has {_LARGEST:,} at most")
    try:
        _require_small(text)
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        said = " ".join(str(error).replace(' in "<unicode string>",', " at").split())
        raise YamlError(f"is not valid YAML: {said[:300]}") from None


def read_yaml_file(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        FileNotFoundError: There is none.
        YamlError: It can't be read, or as :func:`read_text`.
    """
    if path.exists() and not path.is_file():
        raise YamlError("is no file" if path.is_dir() else "is no ordinary file")
    try:
        if path.stat().st_size > _LARGEST:
            raise YamlError(f"holds {path.stat().st_size:,} bytes; a spec has {_LARGEST:,} at most")
        return read_text(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"can't be read: {error}") from None


def read_value(text: str, *, as_text: bool) -> Any:
    """Return the value of an override.

    Args:
        text: What stands behind the equals sign.
        as_text: Whether the field takes text: it is then taken as it is, unless it is quoted or ``null``.

    Raises:
        YamlError: As :func:`read_text`.
    """
    bare = text.strip()
    if as_text and not (bare[:1] in ("'", '"') and bare[-1:] == bare[:1]) and bare not in ("null", "~", ""):
        return bare
    return read_text(text)


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Return what texts such as ``temperature=0.5`` set, by name.

    Raises:
        UserError: One has no equals sign, or its value can't be read.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r}: write it as name=value")
        try:
            found[name] = read_text(value)
        except YamlError as error:
            raise UserError(f"{shortened(text)!r}: the value {error}") from None
    return found


def _require_small(text: str) -> None:
    """Refuse what is deep, or large once its aliases are put in, before anything is built of it."""
    sizes: dict[str, int] = {}
    open_ones: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):
            count += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, count))
            count += 1
            if len(open_ones) > _DEEPEST:
                raise YamlError(f"nests deeper than {_DEEPEST} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > _MOST:
            raise YamlError(f"holds more than {_MOST:,} values, aliases put in")
