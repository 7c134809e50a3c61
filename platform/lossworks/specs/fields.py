"""The fields of a spec in words, one by one, and as a JSON schema for editors."""

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lossworks.catalogue.declaration import within
from lossworks.errors import UserError, nearest
from lossworks.specs.base import Spec


@dataclass(frozen=True)
class FieldInWords:
    """A field of a spec.

    Attributes:
        path: Dotted, as overrides name it.
        value: That the spec has.
        meaning: One line.
        allowed: Which values it may have, in words; empty where the meaning says it.
    """

    path: str
    value: Any
    meaning: str
    allowed: str

    def __str__(self) -> str:
        """Return it in lines for the terminal: what can be copied first, unbroken."""
        value = json.dumps(self.value, ensure_ascii=False)
        text = "; ".join(part for part in (self.meaning, self.allowed) if part)
        body = textwrap.fill(
            text, 76, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
        return f"{self.path}={value}\n{body}" if text else f"{self.path}={value}"


def fields_in_words(spec: Spec, prefix: str = "") -> Iterator[FieldInWords]:
    """Yield every field of a spec, those of its groups and of what it names from the catalogue among them."""
    properties = _properties(type(spec))
    values = spec.model_dump(mode="json")
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if isinstance(value, Spec):
            yield from fields_in_words(value, f"{prefix}{name}.")
        else:
            yield FieldInWords(
                prefix + name, values.get(name), field.description or "", _allowed(properties[name])
            )
    for name, meaning, allowed in spec.further_fields():
        yield FieldInWords(prefix + name, values.get(name), meaning, allowed)


def _properties(group: type[Spec]) -> Mapping[str, Any]:
    """Return the JSON schemas of a group's own fields."""
    schema = group.model_json_schema()
    if "$ref" in schema:
        schema = schema["$defs"][schema["$ref"].rpartition("/")[2]]
    whole = schema["anyOf"][0] if "anyOf" in schema else schema
    found: Mapping[str, Any] = whole["properties"]
    return found


def add_spec_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that takes a spec, which show it and end: see :func:`show_spec`."""
    options = parser.add_mutually_exclusive_group()
    options.add_argument("--print-spec", action="store_true", help="print the whole resolved spec and end")
    options.add_argument(
        "--fields",
        nargs="?",
        const="",
        metavar="NAME",
        help="say what each field of the spec means and may be, or those of one name or group, and end",
    )
    options.add_argument(
        "--schema", action="store_true", help="print the JSON schema of such specs, for editors, and end"
    )


def show_spec(spec: Spec, arguments: argparse.Namespace) -> bool:
    """Print what the options of :func:`add_spec_options` ask for; return whether they did.

    Raises:
        UserError: There is no field of the name that is given.
    """
    if arguments.print_spec:
        print(spec.to_yaml(), end="")
    elif arguments.schema:
        print(json.dumps(type(spec).model_json_schema(), indent=1, ensure_ascii=False))
    elif arguments.fields is not None:
        for field in _named(list(fields_in_words(spec)), arguments.fields):
            print(field)
    else:
        return False
    return True


def _named(fields: list[FieldInWords], name: str) -> list[FieldInWords]:
    """Return the fields of a dotted path, of a group, or of a last name."""
    found = [
        field
        for field in fields
        if not name or field.path in (name,) or field.path.startswith(f"{name}.") or _last(field.path) == name
    ]
    if not found:
        guess = nearest(name, [*(field.path for field in fields), *(_last(field.path) for field in fields)])
        hint = f"did you mean {guess}?" if guess else "--fields without a name lists all"
        raise UserError(f"--fields {name}: there is no such field; {hint}")
    return found


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _allowed(schema: Mapping[str, Any]) -> str:
    """Return what values a JSON schema allows, in words."""
    if "enum" in schema or "const" in schema:
        return f"one of {', '.join(str(value) for value in schema.get('enum', [schema.get('const')]))}"
    if "anyOf" in schema:
        parts = [_allowed(part) for part in schema["anyOf"] if part.get("type") != "null"]
        optional = len(parts) < len(schema["anyOf"])
        text = " or ".join(dict.fromkeys(part for part in parts if part))
        return f"{text}, or null" if optional and text else text or ("or null" if optional else "")
    words = {"boolean": "true or false", "integer": "an integer", "number": "a number", "array": "a list"}
    what = words.get(schema.get("type", ""), "")
    return within(
        what,
        ge=schema.get("minimum"),
        gt=schema.get("exclusiveMinimum"),
        le=schema.get("maximum"),
        lt=schema.get("exclusiveMaximum"),
    )
