"""The local files that a spec names, of whatever room: where they stand in it, and how they are replaced."""

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lossworks.errors import UserError
from lossworks.specs.base import Spec

S = TypeVar("S", bound=Spec)

# Fields that name a path, by the last two keys of their place, with what may stand before it. A sweep has
# them below ``base``, so the places differ between rooms, and the last keys do not.
_FIELDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("availability", "trace"): ("",),
    ("data", "corpus"): ("text:", "pairs:", "preferences:"),
    ("data", "forget"): ("pairs:",),
    ("data", "retain"): ("pairs:",),
    ("data", "chat_template"): ("",),
    ("data", "priors"): ("csv:",),
    ("data", "source"): ("csv:", "parquet:", "npz:", "imagefolder:", "folder:"),
    ("data", "tokenizer"): ("",),
    ("model", "source"): ("hf:",),
    ("of",): ("hf:",),  # of a companion, whose name stands above it
}


@dataclass(frozen=True)
class NamedFile:
    """A path in a spec.

    Attributes:
        keys: Its place, such as ``("base", "data", "corpus")``.
        prefix: What stands before it, such as ``text:``.
        path: File, folder or glob, as it is written.
    """

    keys: tuple[str, ...]
    prefix: str
    path: Path

    def __str__(self) -> str:
        return f"{'.'.join(self.keys)}={self.prefix}{self.path}"


def named_files(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[NamedFile]:
    """Yield every local path in a spec's values."""
    for name, value in values.items():
        keys = (*above, name)
        if isinstance(value, Mapping):
            yield from named_files(value, keys)
        elif isinstance(value, str):
            for prefix in _FIELDS.get(keys[-2:], _FIELDS.get(keys[-1:], ())):
                if value.startswith(prefix):
                    yield NamedFile(keys, prefix, Path(value.removeprefix(prefix)).expanduser())


def require_files(spec: Spec) -> None:
    """Refuse a spec that names a file or folder which there is not, before anything starts.

    Raises:
        UserError: Naming the field.
    """
    for file in named_files(spec.model_dump(mode="json")):
        found = glob.has_magic(str(file.path)) or file.path.exists()
        if not found:
            raise UserError(f"{file}: no such file or folder")


def with_paths(values: Mapping[str, Any], paths: Mapping[tuple[str, ...], str]) -> dict[str, Any]:
    """Return a spec's values with other paths at some places; what stands before them stays."""
    result = {
        name: with_paths(value, {}) if isinstance(value, dict) else value for name, value in values.items()
    }
    prefixes = {file.keys: file.prefix for file in named_files(values)}
    for keys, path in paths.items():
        group = result
        for name in keys[:-1]:
            group = group[name]
        group[keys[-1]] = f"{prefixes[keys]}{path}"
    return result


def located(spec: S) -> S:
    """Return a spec whose local paths are absolute: other processes have other working folders."""
    values = spec.model_dump(mode="json")
    found = {
        ".".join(file.keys): f"{file.prefix}{file.path.absolute()}"
        for file in named_files(values)
        if not file.path.is_absolute()
    }
    # A run's name, or a folder; so a path only where there is such a folder.
    weights = {"start": values.get("start")}
    weights |= {f"roles.{name}.of": role.get("of") for name, role in (values.get("roles") or {}).items()}
    for key, text in weights.items():
        if text and not Path(text).is_absolute() and Path(text).is_dir():
            found[key] = str(Path(text).absolute())
    return spec.override([f"{key}={json.dumps(path)}" for key, path in found.items()]) if found else spec
